"""Importing is quiet and quick, and tells of another owner of the name."""

import importlib.metadata
import pathlib
import subprocess
import sys

import pytest

import coreai_kernels
import coreai_opt

ROOTS = [str(pathlib.Path(module.__file__).parents[1]) for module in (coreai_opt, coreai_kernels)]


def run(code, *paths):
    setup = f"import sys; sys.path[:0] = {[*map(str, paths), *ROOTS]!r}\n"
    result = subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def test_versions():
    assert coreai_opt.__version__ == "0.4.0"
    code = "import coreai_opt; print(coreai_opt.__fused_version__)"
    assert run(code)[0].strip() == importlib.metadata.version("coreai-opt-fused")
    hidden = "import importlib.metadata as m\ndef f(n): raise m.PackageNotFoundError(n)\nm.version = f\n"
    assert run(hidden + code)[0].strip() == "0+unknown"


@pytest.mark.parametrize(
    "name", ["common", "config", "controllers", "palettization", "pruning", "quantization"]
)
def test_subpackages_load_on_first_use(name):
    module = f"coreai_opt.{name}"
    code = f"import sys, coreai_opt\nprint({module!r} in sys.modules, {module}.__name__)"
    assert run(code)[0].split() == [str(name == "common"), module]
    assert name in dir(coreai_opt)


def test_what_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = coreai_opt.nothing


def test_import_says_nothing_and_leaves_logging_alone():
    code = (
        "import logging, coreai_opt\n"
        "assert coreai_opt.quantization.QuantizationSpec().n_bits == 8\n"
        "assert not logging.getLogger().handlers\n"
        "for name in ('torchao', 'torch.utils._pytree'):\n"
        "    assert not logging.getLogger(name).filters, name\n"
        "    assert logging.getLogger(name).level == logging.NOTSET, name\n"
    )
    assert run(code) == ("", "")


def test_the_package_alone_loads_nothing_heavy():
    code = "import coreai_opt\nassert not {'torch', 'torchao', 'pydantic'} & sys.modules.keys()"
    assert run(code) == ("", "")


HEAVY = ("torchao", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy", "triton", "rich")
STEP = f"""
import sys, torch
from torch import nn
before = set(sys.modules)
from coreai_opt.quantization import Quantizer, QuantizerConfig
model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
x = torch.randn(2, 1, 4, 4)
prepared = Quantizer(model, QuantizerConfig(execution_mode="eager")).prepare((x,))
prepared.train()
prepared(x).sum().backward()
assert all(p.grad is not None for p in prepared.parameters())
print(*[name for name in {HEAVY!r} if name in sys.modules and name not in before])
"""


def test_eager_training_imports_neither_torchao_nor_torchs_compiler():
    """Optimizers of torch import its compiler; what is here comes before."""
    assert run(STEP)[0].split() == []


def test_classes_are_torchaos_whoever_is_imported_first():
    ours = (
        "from coreai_opt.quantization import QuantizationSpec\n"
        "from coreai_opt.quantization.spec import factory\n"
        "made = factory.QuantizationComponentFactory.construct_partial("
        "QuantizationSpec(), factory.CompressionTargetTensor.WEIGHT)\n"
    )
    theirs = (
        "from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase, disable_observer\n"
        "from torchao.quantization.pt2e.observer import PartialWrapper\n"
    )
    check = (
        "import pickle, torch\n"
        "quantizer = made()\n"
        "assert isinstance(made, PartialWrapper) and isinstance(made.with_args(n_bits=4), PartialWrapper)\n"
        "assert isinstance(quantizer, FakeQuantizeBase) and issubclass(made.p.func, FakeQuantizeBase)\n"
        "assert not isinstance(torch.nn.Linear(1, 1), FakeQuantizeBase)\n"
        "quantizer.apply(disable_observer)\n"
        "assert quantizer.observer_enabled.item() == 0\n"
        "copy = pickle.loads(pickle.dumps(quantizer))\n"
        "assert isinstance(copy, FakeQuantizeBase) and copy.observer_enabled.item() == 0\n"
    )
    run(ours + theirs + check)
    run(theirs + ours + check)


HOOKS = """
import importlib, types
import coreai_kernels.imports as imports
late = []
imports.once_imported("late_module", late.append)
"""


@pytest.mark.parametrize(
    "others",
    [
        "importlib.reload(imports)",
        # As tools do that trace imports: each finder inside of one of theirs.
        "sys.meta_path[:] = [types.SimpleNamespace(find_spec=f.find_spec) for f in sys.meta_path]",
        # Of the protocol before Python 3.4.
        "sys.meta_path.insert(1, types.SimpleNamespace(find_module=lambda *_: None))",
    ],
)
def test_what_waits_for_an_import_gets_on_with_others_import_hooks(tmp_path, others):
    (tmp_path / "late_module.py").write_text("import late_part\n")
    (tmp_path / "late_part.py").write_text("value = 1\n")
    run(HOOKS + others + "\nimport late_module\nassert late == [late_module], late", tmp_path)


def test_what_comes_to_wait_while_another_thread_imports(tmp_path):
    """The importing thread asked for the module before anybody waited for it."""
    (tmp_path / "late_module.py").write_text("import __main__\n__main__.begun.set(); __main__.go.wait(60)\n")
    code = HOOKS.replace('imports.once_imported("late_module", late.append)', "") + (
        "import threading\n"
        "begun, go = threading.Event(), threading.Event()\n"
        "thread = threading.Thread(target=importlib.import_module, args=('late_module',))\n"
        "thread.start(); begun.wait(60)\n"
        "threading.Timer(0.2, go.set).start()\n"
        "imports.once_imported('late_module', late.append)\n"
        "thread.join()\n"
        "assert late == [sys.modules['late_module']], late\n"
    )
    run(code, tmp_path)


def fake_distribution(folder, name="coreai-opt", version="0.4.0"):
    information = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_without_the_engine_it_says_what_to_install():
    code = "sys.modules['coreai_kernels'] = None\ntry: import coreai_opt\nexcept ImportError as e: print(e)"
    assert "To fix: pip install coreai-kernels" in run(code)[0]


def test_engine_of_another_version(tmp_path):
    fake_distribution(tmp_path, "coreai-opt-fused", "0.2.0")
    fake_distribution(tmp_path, "coreai-kernels", "0.1.9")
    _, said = run("import coreai_opt", tmp_path)
    assert "coreai-opt-fused 0.2.0 needs coreai-kernels 0.2.0, and 0.1.9 is installed" in said
    code = "from coreai_opt import doctor; print(doctor.examine().broken)"
    assert run(code, tmp_path)[0].strip() == "True"


def test_the_engines_plugin_for_apples_package_is_left_alone(tmp_path):
    fake_distribution(tmp_path, "coreai-kernels", importlib.metadata.version("coreai-opt-fused"))
    (information,) = tmp_path.glob("coreai_kernels-*")
    text = "[coreai_opt.plugins]\ncoreai_kernels = coreai_accelerate:activate\n"
    (information / "entry_points.txt").write_text(text)
    assert run("import coreai_opt; assert 'coreai_accelerate' not in sys.modules", tmp_path) == ("", "")


def test_another_owner_of_the_name_elsewhere(tmp_path):
    fake_distribution(tmp_path)
    _, said = run("sys.path.append(sys.path.pop(0))\nimport coreai_opt", tmp_path)
    assert said.count("RuntimeWarning") == 1
    for part in ("coreai-opt 0.4.0", "coreai-opt-fused", "is hidden", "pip uninstall coreai-opt"):
        assert part in said


def test_another_owner_of_the_name_in_the_same_place(tmp_path):
    fake_distribution(tmp_path)
    (tmp_path / "coreai_opt").symlink_to(pathlib.Path(coreai_opt.__file__).parent)
    _, said = run("import coreai_opt", tmp_path)
    assert "mixed" in said
    assert "pip install coreai-opt-fused" in said
