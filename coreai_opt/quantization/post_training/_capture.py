"""What the layers of a prepared model read: which operation takes which weight, and with what inputs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from coreai_opt._transposed_weights import is_transposition
from coreai_opt.quantization.post_training._layers import Layer
from coreai_opt.quantization.post_training._readings import as_function, reading_of

__all__ = ["Capture", "StoppedError", "columns_of"]


class StoppedError(Exception):
    """Raised in a forward that has given what was asked for."""


class Capture(TorchFunctionMode):
    """While it is active, the inputs of layers are handed on.

    The simulators of the layers must be off: it is their parameters that the operations are recognised by.

    Args:
        layers: whose inputs are asked for.
        receive: gets a layer and its input, at each of its calls.
        calls: after so many calls the forward ends with :class:`StoppedError`; None to let it go on.
    """

    def __init__(
        self, layers: Sequence[Layer], receive: Callable[[Layer, Tensor], None], calls: int | None = None
    ) -> None:
        super().__init__()
        self.layers = {id(layer.weight): layer for layer in layers}
        self.receive = receive
        self.calls = calls
        self.seen = 0
        # Transposed views of the weights; identities stay unique while they live.
        self.transposed: dict[int, Tensor] = {}
        self.kept: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reading = reading_of(as_function(func), args, kwargs, self.transposed)
        if reading is not None:
            layer = self.layers.get(id(reading.weight))
            if layer is not None:
                layer.operation, layer.settings = reading.operation, reading.settings
                self.receive(layer, reading.input)
                self.seen += 1
                if self.seen == self.calls:
                    raise StoppedError
        result = func(*args, **kwargs)
        if args and is_transposition(func) and id(args[0]) in self.layers:
            self.transposed[id(result)] = args[0]
            self.kept.append(result)
        return result


def columns_of(layer: Layer, given: Tensor) -> Tensor:
    """A layer's input as what its outputs sum over: float32 of shape ``[groups, positions, columns]``.

    Of a convolution the columns are input channels, each with its positions in the kernel, as in its weight.
    The outputs that ``output_padding`` adds are left out.
    """
    given = given.detach().float()
    if layer.operation in ("linear", "transposed_linear"):
        return given.reshape(1, -1, given.shape[-1])
    axes = layer.weight.dim() - 2
    kernel = layer.weight.shape[2:]
    stride, dilation = (_per_axis(layer.settings.get(name, 1), axes) for name in ("stride", "dilation"))
    if given.dim() == axes + 1:  # a single sample
        given = given.unsqueeze(0)
    if layer.is_transposed:
        given, stride = _spread(layer, given, stride, dilation), (1,) * axes
    else:
        given = F.pad(given, _pads(layer.settings.get("padding", 0), kernel, dilation))
    for axis in range(axes):
        # The window moves to a new axis at the end: first all its elements, of which dilation leaves some.
        extent = dilation[axis] * (kernel[axis] - 1) + 1
        given = given.unfold(2 + axis, extent, stride[axis])[..., :: dilation[axis]]
    samples, channels = given.shape[:2]
    split = given.reshape(samples, layer.groups, channels // layer.groups, *given.shape[2:])
    # From [samples, groups, channels, positions..., kernel...]
    # to [groups, samples, positions..., channels, kernel...].
    positions = list(range(3, 3 + axes))
    order = [1, 0, *positions, 2, *range(3 + axes, 3 + 2 * axes)]
    columns = split.permute(order)
    if layer.is_transposed:
        columns = columns.flip(list(range(columns.dim() - axes, columns.dim())))
    return columns.reshape(layer.groups, -1, math.prod(columns.shape[-1 - axes :]))


def _spread(layer: Layer, given: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """What a transposed convolution reads, with zeros in between: as a convolution with stride 1 does."""
    axes = len(stride)
    padding = _per_axis(layer.settings.get("padding", 0), axes)
    sizes = [(size - 1) * step + 1 for size, step in zip(given.shape[2:], stride, strict=True)]
    spread = given.new_zeros(*given.shape[:2], *sizes)
    places: Any = (..., *(slice(None, None, step) for step in stride))
    spread[places] = given
    kernel = layer.weight.shape[2:]
    # Negative pads take off what the output's padding hides. The output's own margin reads zeros or little.
    margins = [step * (size - 1) - pad for size, step, pad in zip(kernel, dilation, padding, strict=True)]
    return F.pad(spread, [each for margin in reversed(margins) for each in (margin, margin)])


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    return tuple(value) * (axes // len(value)) if isinstance(value, tuple | list) else (value,) * axes


def _pads(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """What torch.nn.functional.pad takes: from the last axis to the first, before and behind."""
    if padding == "same":
        totals = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    elif padding == "valid":
        pairs = [(0, 0)] * len(kernel)
    else:
        pairs = [(each, each) for each in _per_axis(padding, len(kernel))]
    return [end for pair in reversed(pairs) for end in pair]
