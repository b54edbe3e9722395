"""The engine beside Apple's own package: its simulators run on the kernels, the package stays as it is.

Apple's ``coreai-opt`` calls :func:`activate` at the end of its import, by the entry point of this
distribution in the group ``coreai_opt.plugins`` (0.4.0 and newer; before, call it). From then on new fake
quantizers, prune simulators and palettizers are subclasses of Apple's whose forward, masks and clustering are
the engine's: the same results bit for bit. What the engine cannot do the same goes to Apple's method, and
:func:`status` counts why.

``COREAI_ACCELERATE=0`` leaves Apple's package alone; :func:`disable` takes everything back.
"""

import os

from coreai_accelerate.state import STATE, Status

__all__ = ["Status", "activate", "disable", "status"]

ENVIRONMENT = "COREAI_ACCELERATE"


def activate() -> None:
    """Put the engine under Apple's package. A second call changes nothing.

    Raises:
        RuntimeError: the package that is imported as ``coreai_opt`` is not Apple's.
        ValueError: ``COREAI_ACCELERATE`` is neither 0 nor 1.
    """
    wanted = os.environ.get(ENVIRONMENT) or "1"
    if wanted not in ("0", "1"):
        raise ValueError(f"{ENVIRONMENT} must be 0 or 1; got {wanted!r}")
    if wanted == "0" or STATE.is_active:
        return
    import coreai_opt

    if hasattr(coreai_opt, "__fused_version__"):
        raise RuntimeError(
            "coreai_opt is coreai-opt-fused, which runs on the engine already: coreai-kernels is for Apple's "
            "coreai-opt. To fix: pip uninstall coreai-kernels, or install coreai-opt in place of the other"
        )
    from coreai_accelerate import palettization, pruning, quantization

    for part in (quantization, pruning, palettization):
        STATE.replacements += part.replacements()
    for replacement in STATE.replacements:
        replacement.apply()
    STATE.is_active = True


def disable() -> None:
    """Give Apple's package its own classes back; simulators made meanwhile run Apple's methods again."""
    for replacement in reversed(STATE.replacements):
        replacement.undo()
    STATE.replacements.clear()
    STATE.is_active = False


def status() -> Status:
    """What is replaced, and how often a call went to Apple's method, by reason."""
    return Status.now()
