"""Packages that advertise entry points of the group are loaded with the package."""

import pathlib
import subprocess
import sys

import pytest

import coreai_kernels
import coreai_opt
from coreai_opt._plugins import PLUGIN_GROUP

ROOTS = [str(pathlib.Path(module.__file__).parents[1]) for module in (coreai_opt, coreai_kernels)]

MODULE = """
import sys
LOG = []

def register():
    import coreai_opt
    from coreai_opt import ExportBackend
    is_loaded = "coreai_opt.casting" in sys.modules
    LOG.append((ExportBackend.CoreAI.value, coreai_opt.quantization.__name__, is_loaded))
    from coreai_opt.pruning.spec import PruneImplBase
    from coreai_opt.quantization.spec import QParamsCalculatorBase, RangeCalculatorBase
    from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

    @FakeQuantizeImplBase.register("default")
    class MyQuantizer(FakeQuantizeImplBase.REGISTRY["default"]):
        pass

    @QParamsCalculatorBase.register("static")
    class MyStatic(QParamsCalculatorBase.REGISTRY["static"]):
        pass

    @PruneImplBase.register("default")
    class MyPruner(PruneImplBase.REGISTRY["default"]):
        pass

    @RangeCalculatorBase.register("minmax")
    class MyRange(RangeCalculatorBase.REGISTRY["minmax"]):
        pass

def fail():
    raise RuntimeError("nope")
"""
ENTRY_POINTS = f"""
[{PLUGIN_GROUP}]
good = a_plugin:register
bad = a_plugin:fail
missing = no_such_module:x
"""
MODELS = """
import torch
from torch import nn
from coreai_opt.pruning import MagnitudePruner
from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, Quantizer, QuantizerConfig
x = (torch.ones(2, 4),)

def names(model):
    return sorted({type(m).__name__ for m in model.modules() if type(m).__module__ == "a_plugin"})

print(names(Quantizer(nn.Sequential(nn.Linear(4, 4)), QuantizerConfig(execution_mode="eager")).prepare(x)))
spec = {"weight": QuantizationSpec(dtype="int4")}
explicit = ModuleQuantizerConfig(op_state_spec=spec, op_input_spec=None, op_output_spec=None)
config = QuantizerConfig(global_config=explicit, execution_mode="eager")
print(names(Quantizer(nn.Sequential(nn.Linear(4, 4)), config).prepare(x)))
print(names(MagnitudePruner(nn.Sequential(nn.Linear(4, 4))).prepare(x)))
"""


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "a_plugin.py").write_text(MODULE)
    info = tmp_path / "a_plugin-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-plugin\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return tmp_path


def run(code: str, *paths: pathlib.Path) -> tuple[str, str]:
    setup = f"import sys; sys.path[:0] = {[*map(str, paths), *ROOTS]!r}\n"
    done = subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_each_plugin_is_called_once_and_a_failing_one_is_passed_over(folder: pathlib.Path):
    code = "import coreai_opt, coreai_opt, a_plugin\nprint(a_plugin.LOG)"
    out, err = run(code, folder)
    assert out.strip() == "[('coreai', 'coreai_opt.quantization', False)]"
    assert err.count("RuntimeWarning") == 2
    assert "'bad' (a_plugin:fail)" in err
    assert "RuntimeError('nope')" in err
    assert "'missing' (no_such_module:x)" in err


def test_what_a_plugin_registers_is_used(folder: pathlib.Path):
    lines = run(MODELS, folder)[0].splitlines()
    assert lines == [
        "['MyQuantizer', 'MyRange', 'MyStatic']",
        "['MyQuantizer', 'MyRange']",
        "['MyPruner']",
    ]


def test_without_plugins_nothing_is_loaded_or_said():
    code = "import sys, coreai_opt\nprint('torch' in sys.modules)"
    assert run(code) == ("False\n", "")
