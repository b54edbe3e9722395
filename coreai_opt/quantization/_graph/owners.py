"""Which module a quantizer in a graph belongs to: schedules and switches go by it."""

import warnings
from collections.abc import Iterator, Mapping

from torch import nn
from torch.fx import GraphModule, Node

from coreai_opt.quantization._graph.annotate import Annotation
from coreai_opt.quantization._graph.attributes import OWNERS
from coreai_opt.quantization._graph.insert import quantizer_nodes
from coreai_opt.quantization._graph.nodes import module_stack
from coreai_opt.quantization.config import QATSchedule
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["keep_owners", "keep_priorities", "owners_of", "quantizers_in", "schedules_of"]

_PRIORITY = "coreai_opt_priority"


def keep_priorities(annotations: dict[Node, Annotation]) -> None:
    """Write down at each node how its configuration ranks."""
    for node, annotation in annotations.items():
        node.meta[_PRIORITY] = annotation.priority


def keep_owners(model: GraphModule, first_names: dict[str, str]) -> None:
    """Find the owners of all quantizers, and keep them with the graph module and its copies.

    The owner is the innermost module of the neighbour whose configuration takes precedence; of equal ones,
    readers come before the producer.

    Args:
        model: has its quantizers.
        first_names: of modules, by all their names.
    """
    owners = {}
    for node, _ in quantizer_nodes(model):
        neighbours = sorted(
            (*node.users, *node.all_input_nodes), key=lambda each: each.meta.get(_PRIORITY, float("inf"))
        )
        stacks = (list(module_stack(each)) for each in neighbours)
        name = next((stack[-1] for stack in stacks if stack), None)
        if name is not None:
            owners[str(node.target)] = first_names.get(name, name)
    model.meta[OWNERS] = owners


def owners_of(model: GraphModule) -> dict[FakeQuantizeImplBase, list[str]]:
    """Names of the modules that the quantizers belong to; several where modules share one."""
    owners = model.meta.get(OWNERS, {})
    found: dict[FakeQuantizeImplBase, list[str]] = {}
    for node, quantizer in quantizer_nodes(model):
        names = found.setdefault(quantizer, [])
        name = owners.get(str(node.target))
        if name is not None and name not in names:
            names.append(name)
    return found


def schedules_of(
    model: GraphModule, by_module: Mapping[str, QATSchedule]
) -> dict[FakeQuantizeImplBase, QATSchedule]:
    """The schedules of the quantizers that have one: their owner's.

    Warns (UserWarning) of a quantizer that modules with different schedules share: the first one's holds.

    Args:
        model: prepared.
        by_module: of modules, by their first name.
    """
    found = {}
    for quantizer, owners in owners_of(model).items():
        schedules = [by_module[name] for name in owners if name in by_module]
        if any(each != schedules[0] for each in schedules):
            warnings.warn(
                f"the modules {owners} share a quantizer and have different schedules: that of {owners[0]!r} "
                f"holds for it",
                UserWarning,
                stacklevel=2,
            )
        if schedules:
            found[quantizer] = schedules[0]
    return found


def quantizers_in(model: GraphModule, module: nn.Module) -> Iterator[FakeQuantizeImplBase]:
    """The quantizers that belong to ``module``, a part of the graph module, or to modules inside it.

    Raises:
        ValueError: ``module`` is no part of the graph module.
    """
    names = [name for name, each in model.named_modules(remove_duplicate=False) if each is module]
    if not names:
        raise ValueError(
            f"module must be a part of the prepared model, such as prepared.get_submodule('layer'); got a "
            f"{type(module).__name__} from elsewhere"
        )
    prefixes = tuple(f"{name}." if name else "" for name in names)
    for quantizer, owners in owners_of(model).items():
        if any(owner in names or owner.startswith(prefixes) for owner in owners):
            yield quantizer
