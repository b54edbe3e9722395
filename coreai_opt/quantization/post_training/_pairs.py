"""Places where a factor can move from one weight to another: what gives a tensor, and all that read it."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from coreai_opt._call_inputs import Arguments
from coreai_opt._transposed_weights import is_transposition
from coreai_opt.quantization.post_training._layers import Layer, simulated_parameters
from coreai_opt.quantization.post_training._readings import Reading, as_function, reading_of

__all__ = ["Pair", "by_input", "find_pairs", "input_axis"]

# From the weight's arguments on: functions whose result a weight with one value a channel scales.
_NORMS: dict[Callable[..., Any], tuple[int, int]] = {
    F.layer_norm: (2, 3),
    F.group_norm: (2, 3),
    F.rms_norm: (2, -1),
    torch.layer_norm: (2, 3),
    torch.rms_norm: (2, -1),
    F.batch_norm: (3, 4),
    torch.batch_norm: (1, 2),
}
_PRODUCTS = {torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, operator.mul}
# A positive factor of a channel passes through, and channels stay where they are.
_HOMOGENEOUS = {
    F.relu,
    torch.relu,
    Tensor.relu,
    F.leaky_relu,
    F.max_pool1d,
    F.max_pool2d,
    F.max_pool3d,
    F.avg_pool1d,
    F.avg_pool2d,
    F.avg_pool3d,
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
    F.dropout,
    Tensor.contiguous,
    Tensor.float,
    Tensor.to,
    Tensor.type_as,
}
_RESHAPES = {Tensor.view, Tensor.reshape, torch.reshape}


@dataclass(eq=False)
class Pair:
    """What gives a tensor, and the layers that read it: all that do.

    Attributes:
        parameters: weight and bias of the giver; axis 0 of each is the tensor's channels.
        giver: the giver, if it is a quantized layer itself.
        layers: the readers.
        is_direct: whether no other operation than homogeneous functions lies between.
    """

    parameters: list[nn.Parameter]
    giver: Layer | None
    layers: list[Layer] = field(default_factory=list)
    is_direct: bool = True

    def channels(self) -> int:
        """How many factors there are."""
        return len(self.parameters[0])

    def rescale(self, factors: Tensor) -> None:
        """Multiply the readers' inputs in their weights, and divide what the giver gives."""
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.div_(factors.to(parameter.dtype).reshape(-1, *[1] * (parameter.dim() - 1)))
            for layer in self.layers:
                layer.weight.mul_(by_input(layer, factors.to(layer.weight.dtype)))


def by_input(layer: Layer, values: Tensor) -> Tensor:
    """A value for each input channel, in a shape that broadcasts over the layer's weight."""
    shape = [1] * layer.weight.dim()
    shape[input_axis(layer)] = len(values)
    return values.reshape(shape)


def input_axis(layer: Layer) -> int:
    """The axis of the weight with a place for each input channel; depthwise convolutions have them first."""
    return 0 if layer.groups > 1 or layer.is_transposed else 1


@dataclass
class _Source:
    """A giver as it is found; ``is_open`` as long as all its readers are known to be layers."""

    pair: Pair
    axis: int
    is_open: bool = True


class _Tracer(TorchFunctionMode):
    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = {id(layer.weight): layer for layer in layers}
        self.parameters = {id(each): each for each in model.parameters()}
        self.sources: list[_Source] = []
        self.by_tensor: dict[int, _Source] = {}
        # Where the channels are in reshaped results.
        self.axes: dict[int, int] = {}
        self.transposed: dict[int, Tensor] = {}
        self.kept: list[Any] = []
        self.uses: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        func = as_function(func)
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        self.kept.append((tensors, result))
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return result  # shapes, dtypes, devices
        read = [self.by_tensor[id(each)] for each in tensors if id(each) in self.by_tensor]
        for each in tensors:
            if id(each) in self.parameters:
                self.uses[id(each)] = self.uses.get(id(each), 0) + 1
        reading = reading_of(func, args, kwargs, self.transposed)
        if args and is_transposition(func) and id(args[0]) in self.layers:
            self.transposed[id(result)] = args[0]
        elif reading is not None and id(reading.weight) in self.parameters:
            self._layer(reading, read, result)
        elif func in _NORMS and isinstance(result, Tensor):
            self._close(read)
            self._norm(func, args, kwargs, result)
        elif func in _PRODUCTS and isinstance(result, Tensor):
            self._product(tensors, result)
        elif func in _HOMOGENEOUS and len(read) == 1 and isinstance(result, Tensor):
            self.by_tensor[id(result)] = read[0]
            if id(args[0]) in self.axes:
                self.axes[id(result)] = self.axes[id(args[0])]
        elif func in _RESHAPES and len(read) == 1 and self._keeps_last_axis(args[0], read[0], result):
            self.by_tensor[id(result)] = read[0]
            self.axes[id(result)] = result.dim() - 1
        else:
            self._close(read)
        return result

    @staticmethod
    def _close(sources: Sequence[_Source]) -> None:
        for each in sources:
            each.is_open = False

    def _keeps_last_axis(self, given: Tensor, source: _Source, result: Tensor) -> bool:
        is_last = self._axis(given, source) == given.dim() - 1
        return is_last and result.dim() > 0 and result.shape[-1] == given.shape[-1]

    def _open(self, result: Tensor, parameters: Sequence[Any], giver: Layer | None, axis: int) -> None:
        known = [each for each in parameters if isinstance(each, nn.Parameter)]
        if known:
            source = _Source(Pair(known, giver), axis % result.dim())
            self.sources.append(source)
            self.by_tensor[id(result)] = source

    def _layer(self, reading: Reading, read: Sequence[_Source], result: Tensor) -> None:
        weight, bias = reading.weight, reading.bias
        layer = self.layers.get(id(weight))
        axes = weight.dim() - 2
        source = self.by_tensor.get(id(reading.input))
        groups = reading.settings.get("groups", 1)
        is_transposed = "transpose" in reading.operation
        if source is not None:
            depthwise = groups == weight.shape[0] and weight.shape[1] == 1 and not is_transposed
            fits = self._axis(reading.input, source) == reading.input.dim() - 1 - axes and (
                groups == 1 or depthwise
            )
            if layer is None or not fits:
                self._close(read)
            else:
                layer.operation, layer.settings = reading.operation, {"groups": groups}
                if layer not in source.pair.layers:
                    source.pair.layers.append(layer)
        own = [weight] if bias is None else [weight, bias]
        # Of transposed weights, axis 0 is not that of the outputs.
        if not is_transposed and all(isinstance(each, nn.Parameter) for each in own):
            self._open(result, own, layer, result.dim() - 1 - axes)

    def _axis(self, tensor: Tensor, source: _Source) -> int:
        """The axis of the channels, which the source's result has elsewhere if it was reshaped."""
        return self.axes.get(id(tensor), source.axis)

    def _norm(self, func: Any, args: Any, kwargs: dict[str, Any], result: Tensor) -> None:
        places = _NORMS[func]
        weight, bias = (
            (args[place] if 0 <= place < len(args) else kwargs.get(name))
            for place, name in zip(places, ("weight", "bias"), strict=True)
        )
        by_last = func in (F.layer_norm, F.rms_norm, torch.layer_norm, torch.rms_norm)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1:
            own = [weight] if bias is None else [weight, bias]
            if all(isinstance(each, nn.Parameter) for each in own):
                self._open(result, own, None, -1 if by_last else 1)

    def _product(self, tensors: Sequence[Tensor], result: Tensor) -> None:
        sources = [self.by_tensor.get(id(each)) for each in tensors]
        known = [each for each in sources if each is not None]
        parameter = next((each for each in tensors if id(each) in self.parameters), None)
        if parameter is not None and parameter.dim() == 1 and len(parameter) == result.shape[-1]:
            # A norm that is written out: its weight times what it normalised.
            self._close(known)
            self._open(result, [parameter], None, -1)
            return
        if len(known) == 2 and known[0] is known[1]:
            self._close(known)  # a factor would count twice
            return
        same = [
            each
            for each, tensor in zip(sources, tensors, strict=True)
            if each is not None and tensor.shape == result.shape
        ]
        # Either operand's factor passes; one is enough, and the last is the one that is no gate.
        self._close([each for each in known if not same or each is not same[-1]])
        if same:
            same[-1].pair.is_direct = False
            self.by_tensor[id(result)] = same[-1]


def find_pairs(model: nn.Module, layers: Sequence[Layer], example: Arguments) -> list[Pair]:
    """The pairs that one forward of the model shows, whose simulators are off.

    A giver belongs to a pair if its parameters serve nothing else, and if only layers read its result, by way
    of homogeneous functions (relu, pooling) or of products with other tensors.
    """
    tracer = _Tracer(model, layers)
    with torch.no_grad(), tracer:
        result = model(*example.args, **example.kwargs)
    for leaf in tree_leaves(result):
        source = tracer.by_tensor.get(id(leaf))
        if source is not None:
            source.is_open = False
    others = simulated_parameters(model) - {id(layer.weight) for layer in layers}
    found = []
    for source in tracer.sources:
        pair = source.pair
        once = all(tracer.uses.get(id(each)) == 1 for each in pair.parameters)
        readers_once = all(tracer.uses.get(id(layer.weight)) == 1 for layer in pair.layers)
        free = not others.intersection(map(id, pair.parameters))
        if source.is_open and pair.layers and once and readers_once and free:
            found.append(pair)
    return found
