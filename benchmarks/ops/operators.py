"""What the operations' benchmarks share: the engine's bare operators, and parameters for them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

import coreai_kernels
from benchmarks.cases import Case
from benchmarks.harness import NATIVE, Bench, Contender
from coreai_kernels import Format, Scheme
from coreai_kernels.formats import SCALE_FORMATS
from coreai_kernels.ops.library import implementation

__all__ = ["MASK_BYTES", "REFERENCE_UP_TO", "bench_of", "on_device", "qparams_of", "value_range"]

MASK_BYTES = 1 / 8
# Above this size the reference takes long, and tells nothing new.
REFERENCE_UP_TO = 2048

_device: ContextVar[str] = ContextVar("device", default="cpu")


@contextmanager
def on_device(device: str) -> Iterator[None]:
    """Have :func:`bench_of` run operators on this device: it moves their tensors there."""
    token = _device.set(device)
    try:
        yield
    finally:
        _device.reset(token)


def value_range(case: Case) -> tuple[int, float, float]:
    """Format and range of the quantized values, as the operators take them."""
    fmt = case.number_format
    return int(Format[fmt.kernel_format]), fmt.quant_min, fmt.quant_max


def scale_format_of(case: Case) -> int:
    """Format of the scales, as the operators take it."""
    dtype = case.number_format.scale_dtype
    return next(int(kind) for kind, facts in SCALE_FORMATS.items() if facts.dtype == dtype)


def qparams_of(case: Case, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that suit ``x``."""
    fmt = case.number_format
    scale, zero_point, _ = coreai_kernels.choose_qparams(
        *coreai_kernels.observe_range(x, block_size=case.block_size),
        scheme=Scheme.SYMMETRIC,
        quant_min=fmt.quant_min,
        quant_max=fmt.quant_max,
        format=Format[fmt.kernel_format],
        scale_format=scale_format_of(case),
    )
    return scale, zero_point


def bench_of(case: Case, name: str, args: tuple[Any, ...], floor_bytes: float, output_bytes: int) -> Bench:
    """The operator ``name`` as the device chooses it, its reference, and the latter to be compiled."""
    device = _device.get()
    args = tuple(value.to(device) if isinstance(value, Tensor) else value for value in args)
    with coreai_kernels.use_backend("auto"):
        chosen: Callable[..., Any] = implementation(name)
    with coreai_kernels.use_backend("reference"):
        reference: Callable[..., Any] = implementation(name)

    def compiled(compile_function: Callable[..., Any]) -> Callable[[], object]:
        function = compile_function(reference)
        return lambda: function(*args)

    contenders: dict[str, Contender] = {NATIVE: lambda: chosen(*args)}
    if case.size <= REFERENCE_UP_TO:
        contenders["reference"] = lambda: reference(*args)
    return Bench(contenders, floor_bytes, output_bytes, compiled)
