"""What is installed, what runs, and what to do about the rest: ``python -m coreai_opt.doctor``."""

import importlib.metadata
import platform
import sys
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coreai_opt import _environment

__all__ = ["Diagnosis", "Finding", "examine", "main"]

_DISTRIBUTION = "coreai-opt-fused"
_APPLES_DISTRIBUTION = "coreai-opt"
_REQUIRED = ("torch", "torchao", "numpy", "pydantic", "PyYAML", "rich", "safetensors", "tqdm")
_MINIMUM_TORCH = (2, 10)


@dataclass(frozen=True)
class Finding:
    """One row: a part, its state (``"ok"``, ``"missing"`` or ``"broken"``), and what to know about it."""

    part: str
    state: str
    detail: str
    fix: str = ""


@dataclass
class Diagnosis:
    """All findings. The installation is broken if one of them is."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def broken(self) -> bool:
        """Whether a part that must work does not. A part that was left out is not broken."""
        return any(finding.state == "broken" for finding in self.findings)

    def add(self, part: str, state: str, detail: str, fix: str = "") -> None:
        """Append a finding."""
        self.findings.append(Finding(part, state, detail, fix))


def examine() -> Diagnosis:
    """Look at this Python environment."""
    diagnosis = Diagnosis()
    diagnosis.add("python", "ok", f"{platform.python_version()} ({platform.system()} {platform.machine()})")
    _examine_distributions(diagnosis)
    if not diagnosis.broken:
        _examine_engine(diagnosis)
    return diagnosis


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _examine_distributions(diagnosis: Diagnosis) -> None:
    if version := _version(_DISTRIBUTION):
        diagnosis.add(_DISTRIBUTION, "ok", version)
    else:
        diagnosis.add(
            _DISTRIBUTION,
            "missing",
            "used from a source tree, not installed",
            "pip install . --no-build-isolation",
        )
    if version := _version(_APPLES_DISTRIBUTION):
        diagnosis.add(
            _APPLES_DISTRIBUTION,
            "broken",
            f"{version}: Apple's package, too, is imported as coreai_opt; the two overwrite each other",
            f"pip uninstall {_APPLES_DISTRIBUTION} {_DISTRIBUTION}, then install one of them again",
        )
    engines = _version(_environment.ENGINES_DISTRIBUTION)
    mismatch, _, fix = (_environment.engine_mismatch() or "").partition(". To fix: ")
    if mismatch:
        diagnosis.add(_environment.ENGINES_DISTRIBUTION, "broken", mismatch, fix)
    elif engines:
        diagnosis.add(_environment.ENGINES_DISTRIBUTION, "ok", engines)
    else:
        diagnosis.add(
            _environment.ENGINES_DISTRIBUTION,
            "missing",
            "used from a source tree, not installed",
            "pip install ./kernels --no-build-isolation",
        )
    for name in _REQUIRED:
        version = _version(name)
        if version is None:
            diagnosis.add(name, "broken", "required, not installed", f"pip install {name}")
        elif name == "torch" and tuple(int(part) for part in version.split(".")[:2]) < _MINIMUM_TORCH:
            diagnosis.add(name, "broken", f"{version} is too old", "pip install 'torch>=2.10'")
        elif name in ("torch", "torchao"):
            diagnosis.add(name, "ok", version)
    version = _version("triton")
    diagnosis.add("triton", "ok" if version else "missing", version or "not installed", _triton_fix(version))


def _triton_fix(version: str | None) -> str:
    if version:
        return ""
    if sys.platform != "linux":
        return "exists for Linux only"
    return "torch's builds for GPUs bring it; elsewhere only TRITON_INTERPRET=1 needs it: pip install triton"


def _examine_engine(diagnosis: Diagnosis) -> None:
    import torch

    try:
        from coreai_kernels import backends, native
    except (ImportError, RuntimeError, ValueError) as error:
        # A bad environment variable ends here, too; its text names the variable and the choices.
        diagnosis.add("coreai_kernels", "broken", f"cannot be imported: {error}", "see the message")
        return
    forced = backends.forced()
    for name, (usable, reason) in backends.available().items():
        cause, _, fix = reason.partition(". To fix: ")
        broken = not usable and (
            name == forced or (name == "native" and native.missing and native.missing.broken)
        )
        note = f" (forced by {backends.ENVIRONMENT})" if name == forced else ""
        state = "ok" if usable else "broken" if broken else "missing"
        diagnosis.add(f"backend {name}", state, f"{cause or 'usable'}{note}", fix)
    if native.extension is not None:
        info = native.extension.build_info()
        chosen, isas = native.extension.cpu_capability(), info["cpu_isas"]
        diagnosis.add("CPU instruction set", "ok", f"{chosen} (built: {isas})")
        diagnosis.add("native build", "ok", f"{info['compiler']}, against torch {info['torch_version']}")
    archs = native.extension.build_info()["cuda_archs"] if native.extension is not None else "loaded"
    for part, missing, found in (
        ("CUDA C++ kernels", native.cuda_missing, archs),
        ("C++ autograd", native.autograd_missing, "loaded: eager mode spends less time between kernels"),
    ):
        if missing is None:
            diagnosis.add(part, "ok", found)
        else:
            diagnosis.add(part, "broken" if missing.broken else "missing", missing.cause, missing.fix)
    _examine_fast_path(diagnosis)
    if torch.backends.mps.is_available():
        detail = "Metal (mps): plain torch, the reference of every operator; no kernels for it exist"
        diagnosis.add("GPU", "ok", detail)
    elif torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        diagnosis.add("GPU", "ok", ", ".join(names))
    elif torch.xpu.is_available():
        names = [torch.xpu.get_device_name(index) for index in range(torch.xpu.device_count())]
        diagnosis.add(
            "GPU", "ok", f"{', '.join(names)} (xpu): Triton's kernels, which nobody has tried there"
        )
    else:
        diagnosis.add("GPU", "missing", "torch sees none", "only needed for training on a GPU")


def _examine_fast_path(diagnosis: Diagnosis) -> None:
    """Run a small fake quantizer a few times, and see whether its calls are captured."""
    import torch

    from coreai_kernels import runtime
    from coreai_opt.config.spec import CompressionTargetTensor
    from coreai_opt.quantization.spec import QuantizationComponentFactory, QuantizationSpec

    if not runtime.is_enabled():
        reason = "off: COREAI_FAST_PATH=0, or the C++ autograd library is not there"
        diagnosis.add("fast path", "missing", reason)
        return
    create = QuantizationComponentFactory.create_fake_quantizer
    simulator = create(QuantizationSpec(), CompressionTargetTensor.WEIGHT)
    before = runtime.fast_path_counts()
    for _ in range(4):
        simulator(torch.ones(4, 4))
    after = runtime.fast_path_counts()
    hits = after["hits"] - before["hits"]
    refused = {reason: count for reason, count in after["refused"].items() if count}
    if hits:
        diagnosis.add("fast path", "ok", f"calls are captured ({hits} of 4 in a trial)")
    else:
        diagnosis.add("fast path", "missing", f"no call was captured; refused: {refused or 'none'}")


def main() -> int:
    """Print the table; return 0 unless the installation is broken, then 1."""
    diagnosis = examine()
    table = Table(title="coreai-opt-fused")
    for heading in ("part", "state", "found", "to fix"):
        table.add_column(heading, overflow="fold")
    styles = {"ok": "green", "missing": "yellow", "broken": "bold red"}
    for finding in diagnosis.findings:
        state = f"[{styles[finding.state]}]{finding.state}[/]"
        table.add_row(finding.part, state, escape(finding.detail), escape(finding.fix))
    Console().print(table)
    return int(diagnosis.broken)


if __name__ == "__main__":
    sys.exit(main())
