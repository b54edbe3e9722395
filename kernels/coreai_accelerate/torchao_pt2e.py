"""PT2E's fake quantizers, on the engine: those that observe minimum and maximum, on CPU tensors.

The observer, or torch's fused operator, sees the extremes of the tensor's rows in place of the tensor: what
it computes of them is its own. The tensor is then rounded by the engine, with that scale and zero point.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torchao.quantization.pt2e.fake_quantize import FakeQuantize, FusedMovingAvgObsFakeQuantize
from torchao.quantization.pt2e.observer import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)

import coreai_kernels
from coreai_accelerate.state import STATE, PickledAs, fall_back, has_kernels, is_traced
from coreai_kernels.ops.fake_quantize import has_tangent
from coreai_kernels.reference.layout import from_memory_order, memory_order

__all__ = ["FUSED", "FusedFakeQuantize", "FusedMovingAverageFakeQuantize", "refusal"]

_OBSERVERS = (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)
# Torch converts to int64 what it rounds, which is one thing or another for what does not fit. So much does.
_LARGEST = 2.0**20
_LEAST_SCALE = 2.0**-40
_MOST_LEVELS = 2**16
# From so many elements on it pays: below, what is around the kernels takes longer than torch's operator.
_FEWEST = 1 << 15
# Rows that a tensor with one scale is taken as, so that threads have something to share.
_ROWS = (64, 32, 16, 8, 4, 2, 1)


class OnTheEngine(PickledAs):
    """A simulator of torchao's that runs on the engine: a copy does, too, and a pickle is torchao's."""

    __slots__ = ()

    def __copy__(self) -> Any:
        """As :meth:`__deepcopy__`."""
        return self._with_state(self.__reduce_ex__(4)[2], object.__new__(type(self)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """As by default, where ``__reduce_ex__`` would give torchao's class."""
        result = memo[id(self)] = object.__new__(type(self))
        return self._with_state(copy.deepcopy(self.__reduce_ex__(4)[2], memo), result)

    def _with_state(self, state: Any, result: Any) -> Any:
        result.__setstate__(state)
        if self in STATE.of_torchao:
            STATE.of_torchao.add(result)
        return result


class FusedFakeQuantize(FakeQuantize, OnTheEngine):  # type: ignore[misc]
    """PT2E's fake quantizer, which rounds on the engine."""

    _pickled_as = FakeQuantize

    def _get_name(self) -> str:
        return FakeQuantize.__name__

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803
        """What torchao's forward returns."""
        return _forward(self, X, super().forward)


class FusedMovingAverageFakeQuantize(FusedMovingAvgObsFakeQuantize, OnTheEngine):  # type: ignore[misc]
    """PT2E's fused fake quantizer, which rounds on the engine."""

    _pickled_as = FusedMovingAvgObsFakeQuantize

    def _get_name(self) -> str:
        return FusedMovingAvgObsFakeQuantize.__name__

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803
        """What torchao's forward returns."""
        return _forward(self, X, super().forward)


# By torchao's class.
FUSED: dict[type, type] = {
    FakeQuantize: FusedFakeQuantize,
    FusedMovingAvgObsFakeQuantize: FusedMovingAverageFakeQuantize,
}


def refusal(module: nn.Module) -> str | None:
    """Why the engine does not compute what a module of PT2E's classes does; None if it does."""
    observer = module.activation_post_process
    if type(observer) not in _OBSERVERS:
        return f"the observer {type(observer).__name__}"
    if module.zero_point.dtype != torch.int32:
        return "zero points that are no integers"
    if _levels(observer) > _MOST_LEVELS:
        return "more than 16 bits"
    if float(observer.eps) < _LEAST_SCALE:
        return "scales below 2**-40"
    if module.is_per_channel and module.ch_axis != 0:
        return "channels that are not axis 0"
    return None


def _levels(observer: Any) -> int:
    return max(abs(observer.quant_min), abs(observer.quant_max)) + 1


def _forward(module: Any, x: Tensor, torchaos: Callable[[Tensor], Tensor]) -> Tensor:
    """The simulator on the engine, or ``torchaos`` forward."""
    if torch.compiler.is_compiling():
        return torchaos(x)
    if is_traced(x):
        return _left("compiled, traced or transformed", x, torchaos)
    if not x.is_cpu:  # torch has one kernel for a GPU, and the host would wait in the next line
        return _left("device", x, torchaos)
    if module.fake_quant_enabled.item() != 1:
        return torchaos(x)
    rows, reason = _rows(module, x)
    if rows is None:
        return _left(reason, x, torchaos)
    low, high = coreai_kernels.observe_range(rows.detach(), block_size=(1, rows.shape[1]))
    extremes = torch.cat([low, high], 1)
    # Not so for NaN.
    if not extremes.abs().amax().item() <= _LARGEST:
        return _left("values beyond 2**20, or not finite", x, torchaos)
    torchaos(extremes)  # torch's fused operator computes scale and zero point without observing, too
    scale, zero_point, observer = module.scale, module.zero_point, module.activation_post_process
    if not _fit(module, len(rows) if module.is_per_channel else 1):
        fall_back("torchao: parameters of another kind")
        return _by_torch(module, x)
    output = coreai_kernels.fake_quantize_by_reciprocal(
        rows,
        scale.expand(len(rows)).contiguous(),
        zero_point.expand(len(rows)).contiguous(),
        run=rows.shape[1],
        chooses=False,
        is_symmetric=True,
        quant_min=observer.quant_min,
        quant_max=observer.quant_max,
        eps=1.0,
        straight_through=True,
    )
    return output.view(x.shape) if x.is_contiguous() else from_memory_order(output, x.shape, memory_order(x))


def _fit(module: Any, count: int) -> bool:
    """Whether scale and zero point are of the usual kind and size."""
    scale, zero_point, observer = module.scale, module.zero_point, module.activation_post_process
    if (scale.dtype, zero_point.dtype) != (torch.float32, torch.int32):
        return False
    if scale.shape != (count,) or zero_point.shape != (count,):
        return False
    # Torch refuses zero points of channels that are no quantized values.
    bounds = (observer.quant_min, observer.quant_max) if module.is_per_channel else (-_LARGEST, _LARGEST)
    low, high = zero_point.aminmax()
    return scale.amin().item() >= _LEAST_SCALE and low.item() >= bounds[0] and high.item() <= bounds[1]


def _rows(module: Any, x: Tensor) -> tuple[Tensor | None, str]:
    """The tensor as rows that have a scale each, in the order of memory; or None, and why not."""
    reason: str | None = None
    if x.numel() < _FEWEST:
        reason = "few elements"
    elif x.dtype != torch.float32:
        reason = str(x.dtype).removeprefix("torch.")
    elif has_tangent(x):
        reason = "tangent"
    elif not has_kernels(x):
        reason = "no compiled library"
    elif _is_listened_to(module.activation_post_process):
        reason = "hooks"
    reason = reason or refusal(module)
    if reason is not None:
        return None, reason
    order = list(range(x.dim())) if x.is_contiguous() else memory_order(x)
    flat = x.permute(order)
    if not flat.is_contiguous() or (module.is_per_channel and order[0] != 0):
        return None, "strides"
    sizes = (len(x),) if module.is_per_channel else _ROWS
    for count in sizes:
        if x.numel() % (8 * count) == 0:
            return flat.reshape(count, -1), ""
    return None, "block size"


def _is_listened_to(observer: nn.Module) -> bool:
    """Whether somebody else has a say in, or looks at, what is observed: not the tensor, but its extremes."""
    every = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
    own = observer._forward_hooks, observer._forward_pre_hooks
    return any(map(len, (*every, *own))) or "forward" in vars(observer)


def _by_torch(module: Any, x: Tensor) -> Tensor:
    """What torchao's forward returns, after it has observed."""
    observer = module.activation_post_process
    bounds = observer.quant_min, observer.quant_max
    if module.is_per_channel:
        return torch.fake_quantize_per_channel_affine(
            x, module.scale, module.zero_point, module.ch_axis, *bounds
        )
    return torch.fake_quantize_per_tensor_affine(x, module.scale, module.zero_point, *bounds)


def _left(reason: str, x: Tensor, torchaos: Callable[[Tensor], Tensor]) -> Tensor:
    fall_back(f"torchao: {reason}")
    return torchaos(x)
