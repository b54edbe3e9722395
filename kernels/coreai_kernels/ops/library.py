"""The operator library ``coreai_kernels`` and the choice between backends.

Schemas are defined here, in Python, whichever backends exist. The native extension adds its CPU kernels to
the same dispatcher entries from C++; what it leaves open is filled with the reference, which says once that
it stands in for something faster.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from coreai_kernels import backends, native  # noqa: F401  (importing native registers the C++ kernels)

__all__ = ["define", "implementation"]

_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None
_library = torch.library.Library("coreai_kernels", "DEF")
_functions: dict[str, dict[str, Callable[..., Any]]] = {}
_operators: dict[str, Callable[..., Any]] = {}
# Operators with symbolic sizes among their arguments, which TorchScript's tracer cannot record.
_symbolic: set[str] = set()


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    on_cuda: str = "triton",
) -> None:
    """Register operator ``coreai_kernels::name``.

    Args:
        name: name without namespace.
        schema: arguments and results in torch's schema language, e.g. ``"(Tensor x) -> Tensor"``.
        reference: implementation in plain torch, for any device.
        fake: shape function, run on fake tensors.
        triton: implementation for CUDA and XPU tensors.
        on_cuda: what the reference stands in for where CUDA tensors have nothing faster: ``triton``, or
            ``cuda`` for an operator that is written in CUDA C++.
    """
    _library.define(name + schema)
    torch.library.register_fake(f"coreai_kernels::{name}", fake, lib=_library)
    if "SymInt" in schema:
        _symbolic.add(name)
    _operators[name] = getattr(torch.ops.coreai_kernels, name).default
    _functions[name] = {"reference": reference} | ({"triton": triton} if triton else {})
    on_gpu = triton if _TRITON_IS_INSTALLED else None
    # A Mac's GPU has nothing faster, nor has Intel's for what Triton's kernels leave out.
    _library.impl(name, reference, "MPS")
    on_intel = on_gpu if triton else reference
    for key, missing, kernel in (
        ("CPU", "native", None),
        ("CUDA", on_cuda, on_gpu),
        ("XPU", "triton", on_intel),
    ):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"coreai_kernels::{name}", key):
            _library.impl(name, kernel or _standing_in(missing, reference), key)


def implementation(name: str) -> Callable[..., Any]:
    """The operator, or the function of the backend that is forced.

    While TorchScript's tracer is active, it is the reference for operators that the tracer cannot record; in
    the exports to ONNX that build on it, for all.

    Raises:
        RuntimeError: if the forced backend is missing or lacks the operation.
    """
    is_tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    if is_tracing and (name in _symbolic or torch.onnx.is_in_onnx_export()):
        return _functions[name]["reference"]
    forced = backends.forced()
    if forced is None:
        return _operators[name]
    backends.require(forced)
    if forced == "native":
        return _operators[name]
    functions = _functions[name]
    if forced not in functions:
        raise RuntimeError(f"backend {forced!r} has no operation {name!r}; it exists in {sorted(functions)}")
    return functions[forced]


def _standing_in(missing: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(reference)
    def call(*args: Any) -> Any:
        backends.warn_missing_once(missing)
        return reference(*args)

    return call
