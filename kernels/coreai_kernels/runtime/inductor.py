"""What torch's compiler has to know about programs with simulations in them.

The gradient of a ReLU is masked by a comparison. In a float model the compiler computes the mask anew in the
backward, from what is kept for other operations. Behind a ReLU whose result is simulated no other operation
keeps it. The smallest thing to keep is then the mask, as bools: of them inductor's C++ writes one in 15 ns,
and of floats one in 0.7. Here such masks are marked to be computed anew, in the loop that applies them. What
they are computed from is kept instead, as in eager mode.
"""

import functools
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from coreai_kernels.imports import assume_constant_result

__all__ = ["is_exporting", "recompute_masks"]

_OPERATORS = frozenset(
    {"coreai_kernels::observe_and_fake_quantize_unpacked_", "coreai_kernels::fake_quantize"}
)
_COMPARISONS = frozenset({"aten::le", "aten::lt", "aten::ge", "aten::gt"})
_COMBINATIONS = frozenset({"aten::bitwise_or", "aten::bitwise_and", "aten::logical_or", "aten::logical_and"})
_MARK = "recompute"


# Torch's own is true in all that torch 2.10 compiles. This one is called while the compiler traces.
@assume_constant_result
def is_exporting() -> bool:
    """Whether torch.export traces."""
    return torch.compiler.is_exporting()


# Called while torch.compile traces: what it does is no part of the program.
@assume_constant_result
def recompute_masks() -> bool:
    """Let programs for a CPU that inductor compiles from now on compute masks of simulated tensors anew."""
    _register()
    return True


@functools.cache
def _register() -> None:
    # Seconds of imports, which only compiled programs need.
    from torch._inductor.fx_passes import joint_graph

    joint_graph.pass_patterns.append(_MarkMasks())  # type: ignore[arg-type]


class _MarkMasks:
    """A pass over the graph of forward and backward, before the compiler parts them."""

    def apply(self, graph: Graph) -> int:
        """Mark the masks. The number of changes to the graph itself: none."""
        compared = {each for node in graph.nodes if _simulates(node) for each in node.all_input_nodes}
        # An activation is up to two operators: ReLU6 clamps twice, and compares what it clamps.
        for _ in range(2):
            compared |= {each for node in compared for each in node.all_input_nodes}
        for node in graph.nodes if compared else ():
            if _is_mask(node, compared):
                node.meta[_MARK] = CheckpointPolicy.MUST_RECOMPUTE
        return 0


def _name(target: Any) -> str:
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""


def _simulates(node: Node) -> bool:
    # An operator that writes into arguments is itself the argument of one that says which are written.
    return any(_name(each) in _OPERATORS for each in (node.target, *node.args[:1]))


def _is_mask(node: Node, compared: set[Node]) -> bool:
    """Whether the node compares one of these with a number, or joins such comparisons, on a CPU."""
    name, operands = _name(node.target), node.all_input_nodes
    if name in _COMBINATIONS:
        return all(_MARK in each.meta for each in operands)
    if name not in _COMPARISONS or len(operands) != 1 or operands[0] not in compared:
        return False
    value = operands[0].meta.get("val")
    # Random numbers are not drawn twice.
    is_random = torch.Tag.nondeterministic_seeded in getattr(operands[0].target, "tags", ())
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and not is_random
