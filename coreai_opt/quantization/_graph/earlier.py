"""Quantizers that a model has already: those of activations, which finalizing for torch leaves.

They are modules with arithmetic of their own, which the export would write into the graph. While it runs,
each is one operator instead; afterwards it is a quantizer of the new graph, where it was, as it was.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from coreai_opt.quantization._graph.resolve import Place, Placement, Planned
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["EarlierQuantizers"]

_LIBRARY = torch.library.Library("coreai_opt", "FRAGMENT")
_LIBRARY.define("earlier_quantizer(Tensor x, int number) -> Tensor")
_LIBRARY.impl("earlier_quantizer", lambda x, number: x.clone(), "CompositeExplicitAutograd")
_LIBRARY.impl("earlier_quantizer", lambda x, number: torch.empty_like(x), "Meta")


class EarlierQuantizers:
    """The quantizers of a model that is prepared again.

    Attributes:
        quantizers: in the order of the model's modules.
    """

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_modules(remove_duplicate=False))
        self._names = [name for name, module in named if isinstance(module, FakeQuantizeImplBase)]
        modules = (module for _, module in named)
        found = (module for module in modules if isinstance(module, FakeQuantizeImplBase))
        self.quantizers: list[FakeQuantizeImplBase] = list(dict.fromkeys(found))
        self._places: dict[Place, Planned | FakeQuantizeImplBase] = {}

    @contextmanager
    def as_operators(self) -> Iterator[None]:
        """Within the block, the forward of each is a single operator."""
        for number, quantizer in enumerate(self.quantizers):
            # Not by assignment, at which simulators forget what they have captured.
            quantizer.__dict__["forward"] = _operator(number)
        try:
            yield
        finally:
            for quantizer in self.quantizers:
                del quantizer.__dict__["forward"]

    def take_out(self, model: GraphModule) -> None:
        """Take the operators out of the graph, and note where they were."""
        for node in list(model.graph.nodes):
            if node.target is torch.ops.coreai_opt.earlier_quantizer.default:
                source, number = node.args
                places = _places(source, node)
                node.replace_all_uses_with(source)
                model.graph.erase_node(node)
                self._places.update(dict.fromkeys(places, self.quantizers[number]))
        # Their buffers, which the export brings along, are in the way of the new names.
        prefixes = tuple(f"{name}." for name in self._names)
        for node in list(model.graph.nodes):
            if node.op == "get_attr" and str(node.target).startswith(prefixes):
                model.graph.erase_node(node)
        for name in self._names:
            model.delete_submodule(name)

    def put_back(self, placement: Placement) -> None:
        """Let them quantize their tensors, whatever the configuration says of these."""
        own = {place.producer for place in self._places}
        others = {place: plan for place, plan in placement.places.items() if place.producer not in own}
        placement.places = others | self._places


def _places(source: Node, quantized: Node) -> list[Place]:
    """Behind the source, if nothing else reads it; else before the readers of what is quantized."""
    if len(source.users) == 1 and source.op == "call_function":
        return [Place(source)]
    return [Place(source, reader) for reader in quantized.users]


def _operator(number: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return torch.ops.coreai_opt.earlier_quantizer(x, number)  # type: ignore[no-any-return]

    return forward
