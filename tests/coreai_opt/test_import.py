"""Importing is quiet and quick, and tells of another owner of the name."""

import pathlib
import subprocess
import sys

import coreai_kernels
import coreai_opt

ROOTS = [str(pathlib.Path(module.__file__).parents[1]) for module in (coreai_opt, coreai_kernels)]


def run(code, *paths):
    setup = f"import sys; sys.path[:0] = {[*map(str, paths), *ROOTS]!r}\n"
    result = subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def test_version():
    assert isinstance(coreai_opt.__version__, str)
    assert coreai_opt.common.CompressionType.QUANTIZATION == "quantization"


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


def fake_distribution(folder):
    information = folder / "coreai_opt-0.3.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: coreai-opt\nVersion: 0.3.0\n")


def test_another_owner_of_the_name_elsewhere(tmp_path):
    fake_distribution(tmp_path)
    _, said = run("sys.path.append(sys.path.pop(0))\nimport coreai_opt", tmp_path)
    assert said.count("RuntimeWarning") == 1
    for part in ("coreai-opt 0.3.0", "coreai-opt-fused", "is hidden", "pip uninstall coreai-opt"):
        assert part in said


def test_another_owner_of_the_name_in_the_same_place(tmp_path):
    fake_distribution(tmp_path)
    (tmp_path / "coreai_opt").symlink_to(pathlib.Path(coreai_opt.__file__).parent)
    _, said = run("import coreai_opt", tmp_path)
    assert "mixed" in said
    assert "pip install coreai-opt-fused" in said
