"""Which nodes a user asks to leave alone."""

from collections.abc import Callable, Collection
from typing import Any

from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

__all__ = ["node_filter"]


def node_filter(ignored_ops: Any) -> Callable[[fx.Node], bool]:
    """Whether a node is among ``ignored_ops``.

    Raises:
        TypeError: it is no operation, no collection of operations, and no function.
    """
    if ignored_ops is None:
        return lambda node: False
    if isinstance(ignored_ops, OpOverload | OpOverloadPacket):
        ignored_ops = (ignored_ops,)
    elif callable(ignored_ops):
        return ignored_ops  # type: ignore[no-any-return]
    if isinstance(ignored_ops, str) or not isinstance(ignored_ops, Collection):
        raise TypeError(
            f"ignored_ops must be an operation such as torch.ops.aten.exp, a collection of them, or a "
            f"function of a node; got {ignored_ops!r}"
        )
    for op in ignored_ops:
        if not isinstance(op, OpOverload | OpOverloadPacket):
            raise TypeError(
                f"ignored_ops must hold operations such as torch.ops.aten.exp or torch.ops.aten.add.Tensor; "
                f"got {op!r}"
            )
    ignored = frozenset(ignored_ops)

    def is_ignored(node: fx.Node) -> bool:
        target = node.target
        return target in ignored or (isinstance(target, OpOverload) and target.overloadpacket in ignored)

    return is_ignored
