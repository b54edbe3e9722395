"""The engine beside Apple's own package: its simulators run on the kernels, the package stays as it is.

Apple's ``coreai-opt`` (0.3.0 and newer) calls :func:`activate` at the end of its import, by the entry point
of this distribution in the group ``coreai_opt.plugins``. From then on new fake quantizers, prune simulators
and palettizers are subclasses of Apple's whose forward, masks and clustering are the engine's: the same
results bit for bit. What the engine cannot do the same goes to Apple's method, and :func:`status` counts why.

:func:`torchao` does the same for a model that torchao has prepared for quantization-aware training.

``COREAI_ACCELERATE=0`` leaves both packages alone; :func:`disable` takes everything back.
"""

import importlib.metadata
import os
import warnings

from torch import nn

from coreai_accelerate.state import STATE, Status, TorchaoReport

__all__ = ["Status", "TorchaoReport", "activate", "disable", "status", "torchao"]

ENVIRONMENT = "COREAI_ACCELERATE"


def activate() -> None:
    """Put the engine under Apple's package. A second call changes nothing.

    Raises:
        ImportError: Apple's package is not installed.
        RuntimeError: the package that is imported as ``coreai_opt`` is not Apple's.
        ValueError: ``COREAI_ACCELERATE`` is neither 0 nor 1.
    """
    if not _is_wanted() or STATE.is_active:
        return
    try:
        import coreai_opt
    except ModuleNotFoundError as error:
        raise ImportError(
            "coreai_accelerate.activate needs Apple's coreai-opt, which is not installed. "
            "To fix: pip install coreai-opt"
        ) from error
    if hasattr(coreai_opt, "__fused_version__"):
        raise RuntimeError(
            "coreai_opt is coreai-opt-fused, which runs on the engine already: there is nothing to activate. "
            "To fix: pip uninstall coreai-opt-fused, then pip install --force-reinstall --no-deps coreai-opt "
            "for Apple's package; or leave the call out"
        )
    _tell_of_both_packages()
    from coreai_accelerate import palettization, pruning, quantization

    found = [each for part in (quantization, pruning, palettization) for each in part.replacements()]
    for replacement in found:
        replacement.apply()
    STATE.replacements[:] = found
    STATE.is_active = True


def _tell_of_both_packages() -> None:
    try:
        version = importlib.metadata.version("coreai-opt-fused")
    except importlib.metadata.PackageNotFoundError:
        return
    warnings.warn(
        f"coreai-opt-fused {version} is installed beside Apple's coreai-opt, and both are imported as "
        "coreai_opt: files of the one may have replaced files of the other. To fix: pip uninstall coreai-opt "
        "coreai-opt-fused, then install the one that is wanted",
        RuntimeWarning,
        stacklevel=3,
    )


def _is_wanted() -> bool:
    wanted = os.environ.get(ENVIRONMENT) or "1"
    if wanted not in ("0", "1"):
        raise ValueError(f"{ENVIRONMENT} must be 0 or 1; got {wanted!r}")
    return wanted == "1"


def torchao(model: nn.Module) -> TorchaoReport:
    """Put the engine under the simulators of a model that torchao has prepared.

    Those that give the same values, gradients and parameters bit for bit: ``IntxFakeQuantizer`` per token,
    and symmetric per channel or group, on float32; so what ``QATConfig`` prepares for integers, in linear
    layers and embeddings. And of PT2E ``FakeQuantize`` and ``FusedMovingAvgObsFakeQuantize`` that observe
    minimum and maximum, on float32 on a CPU. They become instances of a subclass of torchao's class, in
    place: the state of the model, copies, and torchao's convert step are as before.

    Args:
        model: the prepared model. What it lacks simulators of torchao's, is left as it is.

    Returns:
        Which simulators run on the engine, and why others do not; with ``COREAI_ACCELERATE=0`` it is empty.

    Raises:
        ImportError: torchao is missing, or too far from 0.18, which this was made for.
        TypeError: ``model`` is no module.
        ValueError: ``COREAI_ACCELERATE`` is neither 0 nor 1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if not _is_wanted():
        return TorchaoReport()
    try:
        from coreai_accelerate import torchao_qat
    except ImportError as error:
        raise ImportError(
            f"coreai_accelerate.torchao needs torchao 0.18, or a version with the same classes: {error}"
        ) from error
    return torchao_qat.accelerate(model)


def disable() -> None:
    """Give Apple's package and torchao's models their own classes back.

    Apple's simulators made meanwhile run Apple's methods again.
    """
    STATE.replacements.clear()
    STATE.is_active = False
    if STATE.of_torchao:
        from coreai_accelerate import torchao_qat

        torchao_qat.restore()


def status() -> Status:
    """What is replaced, and how often a call went to Apple's method, by reason."""
    return Status.now()
