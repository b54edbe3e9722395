"""Which implementation runs: chosen by device, or forced with :func:`use_backend`.

The choice is one variable for the whole process, as with ``torch.backends``. A ``ContextVar`` or a
thread-local would not reach the threads in which autograd runs the backward of GPU tensors, and
``torch.compile`` cannot trace ``ContextVar.get``.
"""

import importlib.util
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from coreai_kernels import native

__all__ = ["NAMES", "available", "forced", "require", "use_backend", "warn_missing_once"]

NAMES = ("auto", "reference", "native", "triton")
ENVIRONMENT = "COREAI_KERNELS_BACKEND"

_TRITON_ON_CPU = "set TRITON_INTERPRET=1 before Python starts to interpret the kernels on CPU tensors (slow)"

_lock = threading.Lock()
_requests: list[list[str | None]] = []
_default: str | None = None
_forced: str | None = None
_verified: set[str] = {"reference"}
_warned: set[str] = set()


def forced() -> str | None:
    """Name of the forced backend; None if the device decides."""
    return _forced


def available() -> dict[str, tuple[bool, str]]:
    """Of each backend: whether it can run here, and if not the reason and what to do."""
    native_reason = str(native.missing) if native.missing else ""
    triton_reason = _triton_reason()
    return {
        "reference": (True, ""),
        "native": (not native_reason, native_reason),
        "triton": (not triton_reason, triton_reason),
    }


def require(name: str) -> None:
    """Check that backend ``name`` can run here.

    Raises:
        RuntimeError: if it cannot; the text says why and what to install.
        ValueError: if there is no such backend.
    """
    if name in _verified:  # all that a call in a forced backend pays, and all that torch.compile traces
        return
    _check_name(name)
    if name == "auto":
        return
    usable, reason = available()[name]
    if not usable:
        raise RuntimeError(f"the backend {name!r} of coreai_kernels is forced and missing: {reason}")
    _verified.add(name)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend for the whole process, in all threads, until the context ends.

    Contexts may nest and may overlap between threads: the one entered last decides.

    Args:
        name: ``"reference"``, ``"native"``, ``"triton"``, or ``"auto"`` to let the device decide.

    Raises:
        RuntimeError: if the backend is missing; the text says what to install.
        ValueError: if there is no such backend.
    """
    require(name)
    request = [None if name == "auto" else name]
    with _lock:
        _requests.append(request)
        _apply()
    try:
        yield
    finally:
        with _lock:
            # By identity: equal requests of several threads need not end in order.
            _requests[:] = [other for other in _requests if other is not request]
            _apply()


def warn_missing_once(name: str) -> None:
    """Say, the first time only, that plain torch stands in for backend ``name``, why, and what to do."""
    if name in _warned:
        return
    _warned.add(name)
    if name == "cuda":  # no backend to choose, but a part of the package that may be missing
        usable, reason = native.cuda_missing is None, str(native.cuda_missing)
    else:
        usable, reason = available()[name]
    if usable:
        reason = f"it has no such operation. To fix: {ENVIRONMENT}=reference says that this is intended"
    warnings.warn(
        f"coreai_kernels runs plain torch, which is slower, because its {name} backend is missing: {reason}",
        RuntimeWarning,
        stacklevel=3,
    )


def _apply() -> None:
    global _forced
    _forced = _requests[-1][0] if _requests else _default


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; the backends are {', '.join(NAMES)}")


def _triton_reason() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed. To fix: pip install triton (Linux)"
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() or torch.xpu.is_available():
        return ""
    return f"torch sees no GPU. To fix: {_TRITON_ON_CPU}, or install a driver and a GPU build of torch"


def _read_environment() -> None:
    global _default
    name = os.environ.get(ENVIRONMENT) or "auto"
    try:
        _check_name(name)
    except ValueError as error:
        raise ValueError(f"{ENVIRONMENT}: {error}") from None
    _default = None if name == "auto" else name
    # Now, because torch.compile could not trace the check at the first call. What is missing is reported by
    # require() at that call, so that the library stays importable and can explain itself.
    if name != "auto" and available()[name][0]:
        _verified.add(name)
    _apply()


_read_environment()
