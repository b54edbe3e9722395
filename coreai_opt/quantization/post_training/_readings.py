"""Calls that read a weight, in eager forwards and in graphs: which input they read with it, and how."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from coreai_opt._transposed_weights import is_product

__all__ = ["Reading", "as_function", "reading_of"]

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
# What algorithms call the operation, and the names of its arguments.
_OPERATIONS: dict[Callable[..., Any], tuple[str, tuple[str, ...]]] = {
    F.linear: ("linear", ("input", "weight", "bias")),
    F.conv1d: ("conv1d", _CONVOLUTION),
    F.conv2d: ("conv2d", _CONVOLUTION),
    F.conv3d: ("conv3d", _CONVOLUTION),
    F.conv_transpose1d: ("conv_transpose1d", _TRANSPOSED),
    F.conv_transpose2d: ("conv_transpose2d", _TRANSPOSED),
    F.conv_transpose3d: ("conv_transpose3d", _TRANSPOSED),
    # The weight is [inputs, outputs], as transformers' Conv1D has it.
    torch.addmm: ("transposed_linear", ("bias", "input", "weight")),
    torch.mm: ("transposed_linear", ("input", "weight")),
    torch.matmul: ("transposed_linear", ("input", "weight")),
    Tensor.matmul: ("transposed_linear", ("input", "weight")),
}
# The functions that nodes of a graph call, by the names of their operators.
_OF_ATEN: dict[str, Callable[..., Any]] = {
    **{name: getattr(F, name) for name in ("linear", "conv1d", "conv2d", "conv3d")},
    **{f"conv_transpose{axes}d": getattr(F, f"conv_transpose{axes}d") for axes in (1, 2, 3)},
    **{name: getattr(F, name) for name in ("group_norm", "leaky_relu", "dropout")},
    **{
        f"{kind}_pool{axes}d": getattr(F, f"{kind}_pool{axes}d")
        for kind in ("max", "avg")
        for axes in (1, 2, 3)
    },
    **{f"adaptive_avg_pool{axes}d": getattr(F, f"adaptive_avg_pool{axes}d") for axes in (1, 2, 3)},
    **{name: getattr(torch, name) for name in ("addmm", "mm", "matmul", "layer_norm", "rms_norm")},
    **{name: getattr(torch, name) for name in ("batch_norm", "relu", "mul")},
    "relu_": torch.relu,
    "to": Tensor.to,
    "view": Tensor.view,
    "reshape": Tensor.reshape,
}


@dataclass
class Reading:
    """A call that reads a weight.

    Attributes:
        operation: ``"linear"``; ``"transposed_linear"``, whose weight is ``[inputs, outputs]``; ``"conv1d"``
            to ``"conv3d"``; ``"conv_transpose1d"`` to ``"conv_transpose3d"``.
        input: what it reads with the weight.
        weight: the weight.
        bias: what it adds; None for nothing.
        settings: of a convolution: stride, padding, dilation and groups, as far as they are given.
    """

    operation: str
    input: Any
    weight: Any
    bias: Any = None
    settings: dict[str, Any] = field(default_factory=dict)


def as_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of torch that an operator of a graph stands for; others as they are."""
    if not isinstance(function, OpOverload):
        return function
    packet = function.overloadpacket
    if packet._qualified_op_name.partition("::")[0] != "aten":
        return function
    return _OF_ATEN.get(packet.__name__, function)


def reading_of(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    transposed: Mapping[int, Tensor],
) -> Reading | None:
    """What a call reads, if its weight can be treated; None for other calls.

    Args:
        function: what is called.
        args: its positional arguments.
        kwargs: its keyword arguments.
        transposed: weights by the identity of what ``weight.T`` returned.
    """
    found = _OPERATIONS.get(function)
    if found is None:
        return None
    operation, names = found
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    weight = given.get("weight", given.get("mat2", given.get("other")))
    if is_product(function) and id(weight) in transposed:
        operation, weight = "linear", transposed[id(weight)]
    settings: dict[str, Any] = {
        name: given[name] for name in ("stride", "padding", "dilation", "groups") if name in given
    }
    return Reading(operation, given.get("input", given.get("mat1")), weight, given.get("bias"), settings)
