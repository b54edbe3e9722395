"""What is counted: calls of kernels on so many elements, and repeated calls of a fake quantizer.

Each case makes the same call for two amounts of work, and the difference of the two counts is what the extra
elements, or the extra calls, cost: what is done once a call is no part of it.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch

import coreai_kernels as ck
from coreai_kernels import Format, RangeUpdate, ScaleFormat, Scheme
from coreai_kernels.runtime import fast_path_counts, reset_fast_path_counts

__all__ = ["CALLS", "KERNELS", "Make", "columns_of"]

Make = Callable[[int], Callable[[], object]]
"""From the amount of work to the call that does it."""

_ROWS = 64
_INT4: dict[str, Any] = {"quant_min": -8, "quant_max": 7}
_INT8: dict[str, Any] = {"quant_min": -128, "quant_max": 127}


def columns_of(numel: int) -> int:
    """Columns of the matrix of so many elements that the cases work on."""
    return numel // _ROWS


def _matrix(numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(_ROWS, columns_of(numel), generator=torch.Generator().manual_seed(0)).to(dtype)


def _blocks(granularity: str, x: torch.Tensor) -> tuple[int, ...]:
    return {
        "tensor": tuple(x.shape),
        "rows": (1, x.shape[1]),
        "columns": (x.shape[0], 1),
        "block 32": (1, 32),
    }[granularity]


def _fake_quantize(
    granularity: str, quant: dict[str, Any], dtype: torch.dtype = torch.float32, *, training: bool = True
) -> Make:
    def make(numel: int) -> Callable[[], object]:
        x = _matrix(numel, dtype).requires_grad_(training)
        block_size = _blocks(granularity, x)
        low, high = ck.observe_range(x.detach(), block_size=block_size)
        params = ck.choose_qparams(low, high, scheme=Scheme.SYMMETRIC, **quant)
        return lambda: ck.fake_quantize(x, *params[:2], block_size=block_size, **quant)

    return make


def _gradient(numel: int) -> Callable[[], object]:
    y = _fake_quantize("rows", _INT4)(numel)()
    grad = torch.ones_like(y)  # type: ignore[call-overload]
    return lambda: y.backward(grad, retain_graph=True)  # type: ignore[attr-defined]


def _step(granularity: str, scheme: Scheme, update: RangeUpdate, quant: dict[str, Any]) -> Make:
    def make(numel: int) -> Callable[[], object]:
        x = _matrix(numel).requires_grad_()
        block_size = _blocks(granularity, x)
        grid = ck.grid_shape(x.shape, block_size)
        scale, minval = torch.zeros(grid), torch.zeros(grid)
        zero_point = torch.zeros(grid, dtype=torch.int32)
        running = (torch.zeros(grid), torch.zeros(grid)) if update != RangeUpdate.LATEST else (None, None)
        options = {"scheme": scheme, "update": update, "has_running": update != RangeUpdate.LATEST, **quant}
        return lambda: ck.observe_and_fake_quantize(
            x, scale, zero_point, minval, *running, block_size=block_size, **options
        )

    return make


def _quantize(back: bool) -> Make:
    def make(numel: int) -> Callable[[], object]:
        x = _matrix(numel)
        block_size = _blocks("rows", x)
        scale = torch.full((_ROWS, 1), 0.03)
        q = ck.quantize(x, scale, block_size=block_size, **_INT8, dtype=torch.int8)
        if back:
            return lambda: ck.dequantize(q, scale, block_size=block_size, quant_min=-128)
        return lambda: ck.quantize(x, scale, block_size=block_size, **_INT8, dtype=torch.int8)

    return make


def _palette(numel: int) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    x = _matrix(numel)
    return x, torch.linspace(-2, 2, 16).reshape(1, 16, 1), tuple(x.shape)


def _palettize(numel: int) -> Callable[[], object]:
    x, centroids, block_size = _palette(numel)
    return lambda: ck.palettize(x, centroids, block_size=block_size)


def _lookup(numel: int) -> Callable[[], object]:
    x, centroids, block_size = _palette(numel)
    indices = ck.palettize(x, centroids, block_size=block_size)
    return lambda: ck.lookup(indices, centroids, block_size=block_size)


def _on(call: Callable[[torch.Tensor], object]) -> Make:
    def make(numel: int) -> Callable[[], object]:
        x = _matrix(numel)
        return lambda: call(x)

    return make


def _sampled_mask(numel: int) -> Callable[[], object]:
    x, draw = _matrix(numel), torch.zeros((), dtype=torch.int64)
    logits = x.flip(0).contiguous()
    return lambda: ck.sampled_mask(x, logits, draw, seed=1)


def _pack(numel: int) -> Callable[[], object]:
    values = (torch.arange(numel) % 16 - 8).to(torch.int8)
    return lambda: ck.pack_bits(values, 4)


def _unpack(numel: int) -> Callable[[], object]:
    packed = ck.pack_bits((torch.arange(numel) % 16 - 8).to(torch.int8), 4)
    return lambda: ck.unpack_bits(packed, 4, numel, signed=True)


def _learnable_range(numel: int) -> Callable[[], object]:
    x, width, low = _matrix(numel), torch.full((_ROWS, 1), 4.0), torch.full((_ROWS, 1), -2.0)
    block_size = _blocks("rows", x)
    return lambda: ck.learnable_range(x, width, low, block_size=block_size, level_low=0, level_high=15)


_MX = {"quant_min": -6, "quant_max": 6, "format": Format.E2M1, "scale_format": ScaleFormat.E8M0}
_FP4 = {name: value for name, value in _MX.items() if name != "scale_format"}
_FP8 = {"quant_min": -448, "quant_max": 448, "format": Format.E4M3}
_LATEST, _AVERAGE = RangeUpdate.LATEST, RangeUpdate.MOVING_AVERAGE

KERNELS: dict[str, Make] = {
    "fake_quantize int4 rows": _fake_quantize("rows", _INT4),
    "fake_quantize int4 rows, no gradient": _fake_quantize("rows", _INT4, training=False),
    "fake_quantize int4 rows bf16": _fake_quantize("rows", _INT4, torch.bfloat16),
    "fake_quantize int4 columns": _fake_quantize("columns", _INT4),
    "fake_quantize int4 block 32": _fake_quantize("block 32", _INT4),
    "fake_quantize int8 tensor": _fake_quantize("tensor", _INT8),
    "fake_quantize fp8 rows": _fake_quantize("rows", _FP8),
    "fake_quantize fp4 block 32": _fake_quantize("block 32", _FP4),
    "fake_quantize backward": _gradient,
    "observe_range tensor": _on(lambda x: ck.observe_range(x, block_size=tuple(x.shape))),
    "observe_range columns": _on(lambda x: ck.observe_range(x, block_size=(x.shape[0], 1))),
    "step int4 rows": _step("rows", Scheme.SYMMETRIC, _LATEST, _INT4),
    "step int8 tensor, moving average": _step("tensor", Scheme.ASYMMETRIC, _AVERAGE, _INT8),
    "step fp4 block 32, e8m0": _step("block 32", Scheme.SYMMETRIC, _LATEST, _MX),
    "quantize int8 rows": _quantize(back=False),
    "dequantize int8 rows": _quantize(back=True),
    "pack_bits 4": _pack,
    "unpack_bits 4": _unpack,
    "topk_mask half": _on(lambda x: ck.topk_mask(x, x.numel() // 2)),
    "nm_mask 2:4": _on(lambda x: ck.nm_mask(x, 2, 4)),
    "sampled_mask": _sampled_mask,
    "palettize 16": _palettize,
    "lookup 16": _lookup,
    "learnable_range rows": _learnable_range,
}


def _simulator(target: str, *, observes: bool, training: bool) -> Make:
    from coreai_opt.config.spec import CompressionTargetTensor
    from coreai_opt.quantization.spec import QuantizationComponentFactory, QuantizationSpec

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calculator = "static" if target == "WEIGHT" else "moving_average"
        module: Any = QuantizationComponentFactory.construct(
            QuantizationSpec(dtype="int8", qparam_calculator_cls=calculator), CompressionTargetTensor[target]
        )
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_(training)
    module(x)
    if not observes:
        module.disable_observer()
    for _ in range(10):
        module(x)
    reset_fast_path_counts()
    module(x)
    if fast_path_counts()["hits"] != 1:
        raise RuntimeError(f"a call of {target}'s simulator is not on the fast path: {fast_path_counts()}")

    def make(calls: int) -> Callable[[], object]:
        def repeat() -> None:
            for _ in range(calls):
                module(x)

        return repeat

    return make


CALLS: dict[str, Callable[[], Make]] = {
    "module(x), weight": lambda: _simulator("WEIGHT", observes=True, training=True),
    "module(x), activation": lambda: _simulator("ACTIVATION", observes=True, training=True),
    "module(x), no observer, no gradient": lambda: _simulator("WEIGHT", observes=False, training=False),
}
