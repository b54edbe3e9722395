"""The operations whose tensors are simulated, and what their arguments are called."""

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import resolve_name

__all__ = [
    "FUNCTIONS",
    "LEAF_FORWARDS",
    "MODULES",
    "OPERATIONS",
    "argument_name",
    "as_method",
    "function_name",
    "is_counted",
    "is_in_place",
]

Function = Callable[..., Any]

_BINARY = ("input", "other")
_WEIGHTED = ("input", "weight", "bias")

# Name of an operation, the names of its tensors by position, and the functions that torch reports for it.
OPERATIONS: dict[str, tuple[tuple[str, ...], tuple[Function, ...]]] = {
    "adaptive_avg_pool2d": (("input",), (F.adaptive_avg_pool2d,)),
    "add": (_BINARY, (torch.add, Tensor.add)),
    "add_": (_BINARY, (Tensor.add_,)),
    "conv1d": (_WEIGHTED, (torch.conv1d,)),
    "conv2d": (_WEIGHTED, (torch.conv2d,)),
    "conv3d": (_WEIGHTED, (torch.conv3d,)),
    "conv_transpose1d": (_WEIGHTED, (torch.conv_transpose1d,)),
    "conv_transpose2d": (_WEIGHTED, (torch.conv_transpose2d,)),
    "conv_transpose3d": (_WEIGHTED, (torch.conv_transpose3d,)),
    "embedding": (("input", "weight"), (F.embedding,)),
    "linear": (_WEIGHTED, (F.linear,)),
    "matmul": (_BINARY, (torch.matmul, Tensor.matmul)),
    "max_pool2d": (("input",), (F.max_pool2d,)),
    "mul": (_BINARY, (torch.mul, Tensor.mul)),
    "mul_": (_BINARY, (Tensor.mul_,)),
    "sub": (_BINARY, (torch.sub, Tensor.sub)),
    "sub_": (_BINARY, (Tensor.sub_,)),
}

# What torch.export in strict mode reports for an operator of Python, and the method that eager mode reports.
_METHODS: dict[Function, Function] = {
    operator.add: Tensor.add,
    operator.iadd: Tensor.add_,
    operator.sub: Tensor.sub,
    operator.isub: Tensor.sub_,
    operator.mul: Tensor.mul,
    operator.imul: Tensor.mul_,
    operator.matmul: Tensor.matmul,
}

FUNCTIONS: dict[Function, str] = {
    function: name for name, (_, functions) in OPERATIONS.items() for function in functions
}

# Forwards of torch's own modules that call one operation, once, on their first argument.
LEAF_FORWARDS: dict[Function, str] = {
    nn.AdaptiveAvgPool2d.forward: "adaptive_avg_pool2d",
    nn.Conv1d.forward: "conv1d",
    nn.Conv2d.forward: "conv2d",
    nn.Conv3d.forward: "conv3d",
    nn.ConvTranspose1d.forward: "conv_transpose1d",
    nn.ConvTranspose2d.forward: "conv_transpose2d",
    nn.ConvTranspose3d.forward: "conv_transpose3d",
    nn.Embedding.forward: "embedding",
    nn.Linear.forward: "linear",
    nn.MaxPool2d.forward: "max_pool2d",
}

# Modules whose weights are simulated by default.
MODULES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
)


def as_method(function: Function, args: tuple[Any, ...]) -> tuple[Function, tuple[Any, ...]]:
    """A call as eager mode reports it: the method of the tensor in place of an operator of Python."""
    method = _METHODS.get(function)
    if method is None or len(args) != 2:
        return function, args
    if isinstance(args[0], Tensor):
        return method, args
    # A number comes first. The method for `2 - x` is another than that for `x - 2`.
    return (method, (args[1], args[0])) if method in (Tensor.add, Tensor.mul) else (function, args)


def is_counted(function: Function, args: Iterable[Any], kwargs: Mapping[str, Any] | None) -> bool:
    """Whether a call is one of those of its operation that are counted: unless it is arithmetic of integers.

    Arithmetic on positions and masks alone gives nothing to simulate. Models do it or not, as inputs, caches
    and masks are given. Of other functions that is not known: ``ids / 3`` and ``ids.float()`` give floats.
    """
    if function not in FUNCTIONS:
        return True
    values = args if not kwargs else (*args, *kwargs.values())
    return any(
        each.is_floating_point() if isinstance(each, Tensor) else isinstance(each, float) for each in values
    )


def is_in_place(operation: str) -> bool:
    """Whether the operation writes its result into its first operand."""
    return operation.endswith("_") and not operation.endswith("__")


def function_name(function: Function) -> str | None:
    """What the function is called in names of operations; None for attributes of tensors, such as shape."""
    known = FUNCTIONS.get(function)
    if known is not None:
        return known
    name = (resolve_name(function) or getattr(function, "__name__", "__get__")).rpartition(".")[2]
    return None if name in ("__get__", "__set__", "__delete__", "__setitem__") else name


def argument_name(function: Function, position: int, count: int) -> str:
    """The name of the argument at ``position`` of a call with ``count`` positional arguments.

    The position itself, as text, where the function's signature does not tell.
    """
    known = FUNCTIONS.get(function)
    names = OPERATIONS[known][0] if known is not None else _signature(function, count)
    return names[position] if position < len(names) else str(position)


def _signature(function: Function, count: int) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(function).parameters.values() if inspect.isfunction(function) else ()
    except ValueError:  # a wrapper of what has no signature
        parameters = ()
    names = [each.name for each in parameters if each.kind != each.VAR_POSITIONAL]
    if names:
        return tuple(names)
    name = function.__name__
    packet = None if name.startswith("__") else getattr(torch.ops.aten, name, None)
    for overload in packet.overloads() if packet is not None else ():
        schema = getattr(packet, overload)._schema
        positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
        if len(positional) >= count:
            return tuple("input" if each == "self" else each for each in positional)
    return ()
