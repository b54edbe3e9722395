"""Builds and installs of a small copy of the tree: with a compiler, without one, and again after a change.

The copy holds the build files, the extension module and one tiny kernel file an instruction set: what is
tested is how they are built, and the real kernels would take minutes.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

from coreai_kernels import libraries, native
from coreai_opt import doctor

ROOT = Path(__file__).resolve().parents[1]

MODULE = libraries.MODULE
AUTOGRAD = libraries.autograd_library(torch.__version__, libraries.PYTHON)

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)

KERNEL = """
#include <vector>
namespace coreai::cpu {
float ISA_sum(const std::vector<float>& x) {
  float sum = 0;
  for (float value : x) sum += value;
  return sum;
}
}
"""

CAPTURED = """
#include "ops/captured.h"
namespace coreai {
const CaptureFunctions* capture_functions() {
  static const CaptureFunctions none = {};
  return &none;
}
}
"""

AUTOGRAD_MODULE = """
#include <Python.h>
PyMODINIT_FUNC PyInit__C_autograd() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C_autograd", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
"""


def make_tree(path: Path) -> Path:
    (path / "kernels").mkdir()
    for name in (
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "LICENSE",
        "README.md",
        "Makefile",
        "constraints.txt",
        "kernels/setup.py",
        "kernels/pyproject.toml",
        "kernels/MANIFEST.in",
        "kernels/LICENSE",
    ):
        shutil.copy(ROOT / name, path / name)
    for name in ("csrc/bindings.cpp", "csrc/ops/captured.h", "csrc/cpu/dispatch.h", "csrc/cpu/dispatch.cpp"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, path / name)
    (path / "csrc/ops/captured.cpp").write_text(CAPTURED)
    (path / "csrc/autograd").mkdir()
    (path / "csrc/autograd/module.cpp").write_text(AUTOGRAD_MODULE)
    for isa in ("generic", "avx2", "avx512", "neon"):
        (path / f"csrc/cpu/kernels_{isa}.cpp").write_text(KERNEL.replace("ISA", isa))
    (path / "kernels/coreai_kernels/ops").mkdir(parents=True)
    (path / "kernels/coreai_kernels/__init__.py").touch()
    (path / "kernels/coreai_kernels/ops/__init__.py").touch()
    for name in ("native.py", "formats.py", "libraries.py"):
        shutil.copy(ROOT / "kernels/coreai_kernels" / name, path / "kernels/coreai_kernels" / name)
    (path / "kernels/coreai_accelerate").mkdir()
    (path / "kernels/coreai_accelerate/__init__.py").touch()
    (path / "coreai_opt").mkdir()
    (path / "coreai_opt/__init__.py").touch()
    (path / "coreai_opt/py.typed").touch()
    return path


def run(*command: str, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = ("CXX", "COREAI_CPU_CAPABILITY", "PYTHONPATH")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in settings and not name.startswith(("COREAI_BUILD", "COREAI_AUTOGRAD"))
    }
    result = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert not check or result.returncode == 0, result.stdout[-3000:]
    return result


def install(tree: Path, target: Path, **environment: str) -> str:
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "-v")
    command = ("-m", "pip", "install", *options, "--target", str(target), str(tree), str(tree / "kernels"))
    return run(*command, cwd=tree, **environment).stdout


def build_in_place(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("setup.py", "-q", "build_ext", "--inplace", cwd=tree, **environment)


def compiled(output: str) -> list[str]:
    return sorted(
        line.split()[-1] for line in output.splitlines() if line.startswith("[coreai_kernels] compile")
    )


def ask(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("-c", code, cwd=folder.parent, check=False, PYTHONPATH=str(folder), **environment)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    tree = make_tree(tmp_path_factory.mktemp("built"))
    output = build_in_place(tree, COREAI_BUILD_NATIVE="require").stdout
    assert "csrc/bindings.cpp" in compiled(output)
    return tree


@needs_compiler
class TestNativeBuild:
    def test_module_tells_what_was_built(self, built):
        code = (
            "import json; from coreai_kernels import native as n; print(json.dumps(n.extension.build_info()))"
        )
        info = json.loads(ask(built / "kernels", code).stdout)
        of_machine = {"x86_64": ["generic", "avx2", "avx512"], "aarch64": ["generic", "neon"]}
        assert info["cpu_isas"].split() == of_machine.get(platform.machine(), ["generic"])
        assert info["torch_target_version"] == 0x020A000000000000
        assert set(info) == {"compiler", "cpu_isas", "torch_version", "torch_target_version", "cuda_archs"}

    def test_second_build_compiles_nothing(self, built):
        assert compiled(build_in_place(built).stdout) == []

    def test_changed_header_compiles_its_users(self, built):
        (built / "csrc/cpu/dispatch.h").touch()
        assert compiled(build_in_place(built).stdout) == ["csrc/bindings.cpp", "csrc/cpu/dispatch.cpp"]

    def test_changed_source_compiles_itself(self, built):
        (built / "csrc/cpu/kernels_generic.cpp").touch()
        assert compiled(build_in_place(built).stdout) == ["csrc/cpu/kernels_generic.cpp"]

    def test_compiler_of_an_earlier_build_links_again(self, built, tmp_path):
        tree = shutil.copytree(built, tmp_path / "tree")
        for flag in ("-DONE", "-DOTHER", "-DONE"):
            assert f"link {MODULE}" in build_in_place(tree, CXX=f"c++ {flag}").stdout

    def test_ccache_compiles_unless_a_compiler_was_chosen(self, built, tmp_path):
        tree = shutil.copytree(built, tmp_path / "tree")
        log = tmp_path / "log"
        ccache = tmp_path / "bin/ccache"
        ccache.parent.mkdir()
        ccache.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec "$@"\n')
        ccache.chmod(0o755)
        path = f"{ccache.parent}{os.pathsep}{os.environ['PATH']}"
        build_in_place(tree, PATH=path, CXX="c++ -DCHOSEN")
        assert not log.exists()
        sources = compiled(build_in_place(tree, PATH=path).stdout)
        calls = log.read_text().splitlines()
        assert len(calls) == len(sources) > 0
        assert all(" -c " in call for call in calls)

    def test_no_path_of_this_machine_in_the_binary(self, built):
        if shutil.which("readelf") is None:
            pytest.skip("no readelf")
        library = built / "kernels/coreai_kernels" / MODULE
        dynamic = subprocess.run(
            ["readelf", "-d", library], capture_output=True, text=True, check=True
        ).stdout
        assert "RPATH" not in dynamic
        assert "RUNPATH" not in dynamic

    def test_install_holds_the_packages_and_no_sources(self, built, tmp_path):
        install(built, tmp_path / "site")
        names = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.*")}
        assert {"coreai_opt/__init__.py", "coreai_opt/py.typed", "coreai_kernels/ops/__init__.py"} <= names
        assert {f"coreai_kernels/{name}" for name in (MODULE, AUTOGRAD)} <= names
        assert not [name for name in names if name.endswith((".cpp", ".h", ".o"))]
        code = "from coreai_kernels import native; print(native.missing, native.autograd_missing)"
        assert ask(tmp_path / "site", code).stdout.split() == ["None", "None"]

    def test_failed_compilation_removes_what_an_earlier_one_left(self, built, tmp_path):
        tree = shutil.copytree(built, tmp_path / "tree")
        (tree / "csrc/cpu/kernels_generic.cpp").write_text("this is an error;\n")
        build_in_place(tree)
        assert not (tree / "kernels/coreai_kernels" / MODULE).exists()
        report = json.loads((tree / "kernels/coreai_kernels/_build_report.json").read_text())
        assert "compile csrc/cpu/kernels_generic.cpp failed" in report["native"]["reason"]
        assert run(
            *("setup.py", "build_ext", "--inplace"), cwd=tree, check=False, COREAI_BUILD_NATIVE="require"
        ).returncode

    def test_module_uses_the_limited_api_alone(self, built):
        if shutil.which("nm") is None or libraries.FREE_THREADED:
            pytest.skip("no nm, or no limited API")
        command = ["nm", "-D", "--undefined-only", built / "kernels/coreai_kernels" / MODULE]
        symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        private = [name for name in symbols if name.startswith(("_Py", "__Py"))]
        assert set(private) <= {"_Py_Dealloc", "_Py_NoneStruct"}  # what the limited API's macros come to

    def test_library_of_another_python_is_explained(self, built, tmp_path):
        folder = shutil.copytree(built / "kernels", tmp_path / "kernels") / "coreai_kernels"
        (folder / MODULE).rename(folder / "_C.cpython-399-x86_64-linux-gnu.so")
        result = ask(folder.parent, "from coreai_kernels import native; print(native.missing)")
        assert "built for another Python" in result.stdout

    def test_libraries_of_other_names_do_not_outlive_a_build(self, built, tmp_path):
        tree = shutil.copytree(built, tmp_path / "tree")
        folder = tree / "kernels/coreai_kernels"
        for name in ("_C.cpython-311-x86_64-linux-gnu.so", "_C_autograd-torch2.10-cp311.so"):
            (folder / name).write_bytes(b"of an earlier build")
        build_in_place(tree, COREAI_BUILD_NATIVE="require")
        assert {path.name for path in folder.glob("*.so")} == {MODULE, AUTOGRAD}

    def test_library_that_does_not_load_is_explained(self, built, tmp_path):
        folder = shutil.copytree(built / "kernels", tmp_path / "kernels") / "coreai_kernels"
        (folder / MODULE).write_bytes(b"not a library")
        result = ask(folder.parent, "from coreai_kernels import native; print(native.missing)")
        assert "does not load beside torch" in result.stdout
        assert "To fix: pip install" in result.stdout

    def test_autograd_library_is_loaded_beside_its_torch_and_python_only(self, built, tmp_path):
        folder = shutil.copytree(built / "kernels", tmp_path / "kernels") / "coreai_kernels"
        path = folder / "_build_report.json"
        report = json.loads(path.read_text())
        python = libraries.PYTHON
        assert report["autograd"] == {"built": True, "torch": [torch.__version__], "python": [python]}
        (folder / AUTOGRAD).rename(folder / "_C_autograd-torch2.9-cp310.so")
        code = "from coreai_kernels import native; print(native.autograd_missing)"
        assert "its file is gone" in ask(folder.parent, code).stdout
        path.write_text(
            json.dumps(report | {"autograd": {"built": True, "torch": ["2.9.1"], "python": ["3.10"]}})
        )
        said = ask(folder.parent, code).stdout
        this = f"torch {torch.__version__} and Python {python}"
        assert f"built for torch 2.9.1 and Python 3.10, and this is {this}" in said
        assert "To fix: pip install" in said

    def test_autograd_library_for_several_torches(self, built, tmp_path):
        """What is built for another torch needs its headers only, and is there beside the installed one's."""
        tree = shutil.copytree(built, tmp_path / "tree")
        root = Path(torch.__file__).parent
        other = tmp_path / "torch"
        other.mkdir()
        (other / "include").symlink_to(root / "include")
        (other / "version.py").write_text("__version__ = '2.97.0'\n")
        build_in_place(
            tree, COREAI_BUILD_NATIVE="require", COREAI_AUTOGRAD_TORCHES=f"{other}{os.pathsep}{root}"
        )
        folder = tree / "kernels/coreai_kernels"
        assert {path.name for path in folder.glob("_C_autograd*.so")} == {
            AUTOGRAD,
            AUTOGRAD.replace(libraries.torch_interface(torch.__version__), "2.97"),
        }
        assert json.loads((folder / "_build_report.json").read_text())["autograd"]["torch"] == [
            "2.97.0",
            torch.__version__,
        ]
        code = "from coreai_kernels import native; print(native.autograd.__file__)"
        assert ask(folder.parent, code).stdout.strip().endswith(AUTOGRAD)


@pytest.mark.parametrize(
    ("version", "interface"),
    [
        ("2.13.0", "2.13"),
        ("2.13.1+cpu", "2.13"),
        ("2.14.1+cu130", "2.14"),
        ("2.14.0a0+gitabc123", "2.14.0a0+gitabc123"),
        ("2.15.0.dev20261101+cpu", "2.15.0.dev20261101+cpu"),
        ("2.13.0+local.patch", "2.13.0+local.patch"),
    ],
)
def test_releases_of_one_minor_version_run_each_others_code(version, interface):
    assert libraries.torch_interface(version) == interface


def test_install_without_a_compiler(tmp_path):
    (tmp_path / "tree").mkdir()
    tree = make_tree(tmp_path / "tree")
    for name in ("coreai_opt", "kernels"):
        shutil.rmtree(tree / name)
        ignored = shutil.ignore_patterns("*.so", "_build_report.json", "__pycache__")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    site = tmp_path / "site"
    output = install(tree, site, CXX="/nonexistent/c++")
    assert "[coreai_kernels] not built: /nonexistent/c++ cannot be run" in output
    result = ask(site, "from coreai_kernels import native; print(native.extension, native.missing)")
    assert result.stdout.startswith("None /nonexistent/c++ cannot be run")
    assert "To fix: install a C++20 compiler" in result.stdout
    result = ask(site, TRAIN_A_STEP)
    assert result.stdout.split()[-2:] == ["True", "False"]


TRAIN_A_STEP = """
import torch
import coreai_opt.palettization, coreai_opt.pruning, coreai_opt.controllers
from coreai_kernels.runtime import fast_path_counts
from coreai_opt.quantization import Quantizer, QuantizerConfig
model = torch.nn.Linear(8, 4)
quantizer = Quantizer(model, QuantizerConfig(execution_mode="eager"))
model = quantizer.prepare((torch.randn(2, 8),))
with quantizer.training_mode():
    model(torch.randn(2, 8)).sum().backward()
print(model.parametrizations.weight.original.grad is not None, fast_path_counts()["enabled"])
"""


@pytest.fixture
def tree(tmp_path) -> Path:
    (tmp_path / "tree").mkdir()
    return make_tree(tmp_path / "tree")


def test_sdists_are_complete_and_hold_no_build_products(tree):
    (tree / "kernels/coreai_kernels/_C.cpython-311-x86_64-linux-gnu.so").touch()
    (tree / "kernels/coreai_kernels/_build_report.json").touch()
    dropin, requirements = make_sdist(tree)
    engine, _ = make_sdist(tree / "kernels")
    assert {"setup.py", "LICENSE", "coreai_opt/py.typed"} <= dropin
    assert {"setup.py", "LICENSE", "csrc/cpu/dispatch.h", "csrc/bindings.cpp"} <= engine
    assert "coreai_kernels/native.py" in engine
    assert not [name for name in dropin | engine if name.endswith((".so", "_build_report.json"))]
    # What leaves the checkout names no folder of it.
    assert not [name for name in dropin if name.startswith(("kernels", "csrc"))]
    assert "coreai-kernels==" in requirements


def make_sdist(folder: Path) -> tuple[set[str], str]:
    """The files of a source distribution, and the metadata of a wheel that is built from it."""
    run("setup.py", "-q", "sdist", cwd=folder)
    (archive,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[-1] for name in tar.getnames()}
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
    run("-m", "pip", "wheel", "-q", *options, "-w", "dist", str(archive), cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as wheel_file:
        (metadata,) = (name for name in wheel_file.namelist() if name.endswith("/METADATA"))
        return names, wheel_file.read(metadata).decode()


class Environment:
    """A fresh environment, over what this one has."""

    def __init__(self, folder: Path) -> None:
        run("-m", "venv", "--without-pip", str(folder), cwd=folder.parent)
        self.python = folder / "bin/python"
        self.site = folder / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        (self.site / "over.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))

    def pip(self, *command: str, check: bool = True) -> str:
        options = ("-m", "pip", "--python", str(self.python), "--disable-pip-version-check")
        return run(*options, *command, cwd=self.site, check=check, COREAI_BUILD_NATIVE="skip").stdout

    def install(self, *what: str) -> None:
        self.pip("install", "-q", "--no-build-isolation", "--no-index", *what)

    def owned(self, distribution: str) -> set[str]:
        (record,) = self.site.glob(f"{distribution}-*.dist-info/RECORD")
        return {line.split(",")[0] for line in record.read_text().splitlines()}

    def has(self, package: str) -> bool:
        return (self.site / package / "__init__.py").exists()


def test_one_command_installs_two_distributions_that_share_no_file(tree, tmp_path):
    environment = Environment(tmp_path / "environment")
    environment.install(str(tree))
    dropin, engine = environment.owned("coreai_opt_fused"), environment.owned("coreai_kernels")
    assert not dropin & engine
    assert {"coreai_opt/__init__.py", "coreai_opt/py.typed"} <= dropin
    assert {"coreai_kernels/__init__.py", "coreai_accelerate/__init__.py"} <= engine
    environment.pip("uninstall", "-q", "-y", "coreai-opt-fused")
    assert (environment.has("coreai_opt"), environment.has("coreai_kernels")) == (False, True)


def test_wheels_name_the_engines_version(tree, tmp_path):
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
    run("-m", "pip", "wheel", "-q", *options, "-w", "dist", ".", cwd=tree, COREAI_BUILD_ENGINE="version")
    environment = Environment(tmp_path / "environment")
    (wheel,) = (tree / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    # This environment's own engine, where there is one, would do.
    (environment.site / "over.pth").unlink()
    said = environment.pip("install", "--no-index", str(wheel), check=False)
    assert "coreai-kernels==" in said


def test_both_distributions_have_one_version():
    versions = {
        tomllib.loads((folder / "pyproject.toml").read_text())["project"]["version"]
        for folder in (ROOT, ROOT / "kernels")
    }
    assert len(versions) == 1


def test_wheel_without_torch_at_hand_says_so(tree):
    # What an isolated build sees: setuptools, no torch.
    hide = "import importlib.util as u, runpy, sys; find = u.find_spec\n"
    hide += "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
    hide += "sys.argv = ['setup.py', '-q', 'bdist_wheel']; runpy.run_path('setup.py', run_name='__main__')"
    run("-c", hide, cwd=tree / "kernels")
    (wheel,) = (tree / "kernels/dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        report = json.loads(archive.read("coreai_kernels/_build_report.json"))
    assert "torch was not there" in report["native"]["reason"]
    assert "--no-build-isolation" in report["native"]["fix"]


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_cuda_library_compiles_beside_a_cpu_torch(tmp_path):
    (tmp_path / "tree").mkdir()
    tree = make_tree(tmp_path / "tree")
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/twice.cu").write_text(
        """#include <torch/csrc/inductor/aoti_torch/c/shim.h>
        __global__ void twice(float* x) { x[threadIdx.x] *= 2; }
        void run(float* x) {
          void* stream = nullptr;
          aoti_torch_get_current_cuda_stream(0, &stream);
          twice<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(x);
        }"""
    )
    build_in_place(tree, COREAI_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="7.5;8.0;9.0+PTX")
    folder = tree / "kernels/coreai_kernels"
    assert json.loads((folder / "_build_report.json").read_text())["cuda"] == {"built": True}
    assert (folder / "_C_cuda.so").exists()
    code = "from coreai_kernels import native as n; print(n.extension.build_info()['cuda_archs'])"
    assert ask(tree / "kernels", code).stdout.split() == ["sm_80", "sm_90", "compute_90"]


class TestDoctor:
    def test_healthy_installation(self, capsys, monkeypatch):
        monkeypatch.delenv("COREAI_KERNELS_BACKEND", raising=False)
        assert doctor.main() == 0
        printed = capsys.readouterr().out
        for part in (
            "python",
            "torchao",
            "backend native",
            "backend triton",
            "CUDA C++ kernels",
            "C++ autograd",
            "GPU",
        ):
            assert part in printed

    def test_every_missing_part_has_a_fix(self):
        diagnosis = doctor.examine()
        assert all(finding.fix for finding in diagnosis.findings if finding.state != "ok")

    def test_part_left_out_is_not_broken(self, monkeypatch):
        monkeypatch.setattr(native, "extension", None)
        monkeypatch.setattr(native, "missing", native.Missing("no C++ compiler was found", "apt install g++"))
        diagnosis = doctor.examine()
        finding = next(item for item in diagnosis.findings if item.part == "backend native")
        assert (finding.state, finding.detail, finding.fix) == (
            "missing",
            "no C++ compiler was found",
            "apt install g++",
        )
        assert not diagnosis.broken

    def test_extension_that_does_not_load_is_broken(self, monkeypatch):
        monkeypatch.setattr(native, "extension", None)
        monkeypatch.setattr(native, "missing", native.Missing("undefined symbol", "reinstall", broken=True))
        assert doctor.examine().broken

    @pytest.mark.parametrize(
        ("distribution", "version", "text"),
        [
            ("coreai-opt", "0.4.0", "overwrite each other"),
            ("torch", "2.9.1", "too old"),
            ("pydantic", None, "required, not installed"),
        ],
    )
    def test_broken_environment(self, monkeypatch, distribution, version, text):
        real = doctor._version
        monkeypatch.setattr(doctor, "_version", lambda name: version if name == distribution else real(name))
        diagnosis = doctor.examine()
        assert diagnosis.broken
        assert any(text in finding.detail for finding in diagnosis.findings if finding.state == "broken")


def test_readme_example_runs(tmp_path):
    text = (ROOT / "README.md").read_text()
    example = text.split("```python\n", 1)[1].split("```", 1)[0]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    result = run("-c", example, cwd=tmp_path, PYTHONPATH=paths)
    assert "loss with int4 weights" in result.stdout
