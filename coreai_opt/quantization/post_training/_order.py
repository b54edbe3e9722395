"""In which order layers run, which of them read the same tensor, and which modules form a chain of blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from coreai_opt._call_inputs import Arguments
from coreai_opt.quantization.post_training._capture import Capture
from coreai_opt.quantization.post_training._layers import Layer

__all__ = ["Block", "Order", "first_tensor", "order_of"]

# Layers that read the same tensor.
Readers = list[Layer]


@dataclass
class Block:
    """A module of a chain: what one returns, the next one takes.

    Attributes:
        module: the module.
        readers: its layers, in the order of their calls.
    """

    module: nn.Module
    readers: list[Readers]


@dataclass
class Order:
    """The layers of a model in the order of their calls.

    Attributes:
        before: those before the chain.
        chain: the blocks; empty where there is no chain.
        after: those behind it; without a chain all of them.
        repeated: layers that a forward calls several times.
    """

    before: list[Readers] = field(default_factory=list)
    chain: list[Block] = field(default_factory=list)
    after: list[Readers] = field(default_factory=list)
    repeated: set[Layer] = field(default_factory=set)

    @property
    def all(self) -> list[Readers]:
        """All readers, in order."""
        return [*self.before, *(each for block in self.chain for each in block.readers), *self.after]


@dataclass
class _Forward:
    """A call of a module: arguments, result, and the calls of layers before its begin and before its end."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    begin: int
    result: Any = None
    end: int = 0


def first_tensor(result: Any) -> Tensor | None:
    """What a block hands on: its result, or the first tensor of it."""
    return next((leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)), None)


def order_of(model: nn.Module, layers: Sequence[Layer], example: Arguments) -> Order:
    """Run the model once, and see. Layers that the example does not reach come last in their block."""
    calls: list[tuple[Layer, Tensor]] = []
    forwards: dict[nn.Module, list[_Forward]] = {}
    candidates = _containers(model, layers)
    handles = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        forwards.setdefault(module, []).append(_Forward(args, kwargs, len(calls)))

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        forwards[module][-1].result, forwards[module][-1].end = result, len(calls)

    try:
        for child in {child for children in candidates for child in children}:
            handles.append(child.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(child.register_forward_hook(leave))
        with torch.no_grad(), Capture(layers, lambda layer, given: calls.append((layer, given))):
            model(*example.args, **example.kwargs)
    finally:
        for handle in handles:
            handle.remove()

    chains = [_chain(children, forwards, calls) for children in candidates]
    chain = max(chains, key=len, default=[])
    found = Order()
    seen: set[Layer] = set()
    for layer, _ in calls:
        if layer in seen:
            found.repeated.add(layer)
        seen.add(layer)
    begin = forwards[chain[0]][0].begin if chain else 0
    end = forwards[chain[-1]][0].end if chain else 0
    unreached = [layer for layer in layers if layer not in seen]
    done: set[Layer] = set()
    found.before = _readers(calls[:begin], done)
    for module in chain:
        forward = forwards[module][0]
        readers = _readers(calls[forward.begin : forward.end], done)
        inside = set(module.modules())
        readers += [[layer] for layer in unreached if layer.module in inside]
        done.update(layer for each in readers for layer in each)
        found.chain.append(Block(module, readers))
    found.after = _readers(calls[end:], done)
    found.after += [[layer] for layer in unreached if layer not in done]
    return found


def _containers(model: nn.Module, layers: Sequence[Layer]) -> list[list[nn.Module]]:
    """Children of each list of modules, if several of them have layers."""
    owners = {layer.module for layer in layers}
    found = []
    for container in model.modules():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            children = list(container)
            if sum(not owners.isdisjoint(child.modules()) for child in children) > 1:
                found.append(children)
    return found


def _chain(
    children: Sequence[nn.Module],
    forwards: dict[nn.Module, list[_Forward]],
    calls: Sequence[tuple[Layer, Tensor]],
) -> list[nn.Module]:
    """The children that were called, if they form a chain; else none."""
    called = [child for child in children if child in forwards]
    if len(called) < 2 or len(set(map(id, called))) < len(called):
        return []
    if any(len(forwards[child]) > 1 for child in called):
        return []
    runs = [forwards[child][0] for child in called]
    for run, after in pairwise(runs):
        handed_on = first_tensor(run.result)
        if run.end != after.begin or not after.args or after.args[0] is not handed_on or handed_on is None:
            return []
        if not _same(run.args[1:], after.args[1:]) or not _same(run.kwargs, after.kwargs):
            return []
    blocks = [{id(layer) for layer, _ in calls[run.begin : run.end]} for run in runs]
    outside = {id(layer) for layer, _ in (*calls[: runs[0].begin], *calls[runs[-1].end :])}
    if sum(map(len, blocks)) + len(outside) != len({id(layer) for layer, _ in calls}):
        return []  # a layer is called from several of them
    return called


def _same(a: Any, b: Any) -> bool:
    """Whether two structures hold the same tensors and equal other values."""
    mine, its = tree_leaves(a), tree_leaves(b)
    return len(mine) == len(its) and all(
        x is y or (not isinstance(x, Tensor) and not isinstance(y, Tensor) and type(x) is type(y) and x == y)
        for x, y in zip(mine, its, strict=True)
    )


def _readers(calls: Sequence[tuple[Layer, Tensor]], done: set[Layer]) -> list[Readers]:
    """Layers by what they read first; those that are ``done`` left out, the others added to it."""
    found: dict[tuple[int, str, int], Readers] = {}
    for layer, given in calls:
        if layer not in done:
            done.add(layer)
            # Convolutions read the same columns only with the same kernel.
            is_linear = layer.operation in ("linear", "transposed_linear")
            key = (id(given), layer.operation, 0 if is_linear else id(layer))
            found.setdefault(key, []).append(layer)
    return list(found.values())
