"""A model's arguments, in the forms in which people have them."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from coreai_opt._state_tensors import check_example_inputs

__all__ = [
    "Arguments",
    "Inputs",
    "arguments_of",
    "arguments_of_batch",
    "example_arguments",
    "keywords_added",
    "read_inputs",
]


@dataclass(frozen=True)
class Arguments:
    """The arguments of one forward.

    Attributes:
        args: positional ones: all that the signature allows to be.
        kwargs: those that are by keyword only.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """What there is to run a model on.

    Attributes:
        example: arguments of the first forward.
        batches: the arguments of all forwards, that one included; None where there is only one. To be read
            once.
        length: how many batches there are; None where nothing tells.
    """

    example: Arguments
    batches: Iterator[Arguments] | None
    length: int | None


def read_inputs(model: nn.Module, data: Any, input_fn: Callable[[Any], Any] | None = None) -> Inputs:
    """The arguments of ``model`` in ``data``, on the device of its first parameter.

    Args:
        model: has a ``forward`` with a signature.
        data: arguments of one forward: a tensor, a tuple of positional ones, or a mapping of keywords; or any
            other iterable of batches, such as a DataLoader. A batch has the same forms, but that a tuple or
            list may go on behind what ``forward`` requires, with targets: these are passed over.
        input_fn: takes a batch, and returns a tensor, a tuple or a mapping.

    Raises:
        TypeError: ``data`` or a batch is none of these, or ``forward`` does not take it.
        ValueError: there is no batch.
    """
    if input_fn is not None and not callable(input_fn):
        raise TypeError(f"input_fn must be a function of a batch; got {type(input_fn).__name__}")
    if isinstance(data, Tensor | tuple | Mapping):
        found = data if input_fn is None else input_fn(data)
        return Inputs(arguments_of(model, found, "inputs"), None, 1)
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise TypeError(
            f"inputs must be a tensor, a tuple of positional arguments, a mapping of keyword arguments, or "
            f"an iterable of batches such as a DataLoader; got {type(data).__name__}"
        )
    batches = (arguments_of_batch(model, batch, input_fn) for batch in data)
    first = next(batches, None)
    if first is None:
        raise ValueError(f"inputs, a {type(data).__name__}, gives no batch")
    length = len(data) if isinstance(data, Sized) else None
    return Inputs(first, chain((first,), batches), length)


@contextmanager
def keywords_added(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """A context in which each call of the model itself gets these keyword arguments, too."""
    if not kwargs:
        yield
        return

    def add(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, **given}

    handle = model.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def example_arguments(model: nn.Module, example_inputs: Any) -> Arguments:
    """Example inputs as arguments, of which what can be given by position is.

    Args:
        model: has a ``forward`` with a signature.
        example_inputs: positional arguments, or a mapping of keyword ones.

    Raises:
        TypeError: it is neither, or ``forward`` does not take the keywords.
    """
    if isinstance(example_inputs, Mapping):
        return arguments_of(model, example_inputs, "example_inputs")
    check_example_inputs(example_inputs)
    return Arguments(example_inputs, {})


def arguments_of_batch(
    model: nn.Module, batch: Any, input_fn: Callable[[Any], Any] | None = None
) -> Arguments:
    """The arguments of ``model`` in a batch, in one of the forms that :func:`read_inputs` names."""
    if input_fn is not None:
        return arguments_of(model, input_fn(batch), "what input_fn returns")
    if isinstance(batch, tuple | list):
        if not batch:
            raise ValueError("inputs: a batch is empty")
        if isinstance(batch[0], tuple | Mapping):
            return arguments_of(model, batch[0], "the first of a batch")
        return arguments_of(model, tuple(batch[: max(1, _required(model))]), "a batch")
    return arguments_of(model, batch, "a batch")


def _required(model: nn.Module) -> int:
    """How many positional arguments ``forward`` requires."""
    parameters = inspect.signature(model.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in positional and each.default is each.empty for each in parameters)


def arguments_of(model: nn.Module, given: Any, what: str) -> Arguments:
    """Arguments of ``model``, as far as they can be by position, on the device of its first parameter.

    Args:
        model: has a ``forward`` with a signature.
        given: a tensor, a tuple of positional arguments, or a mapping of keyword ones.
        what: what it is, for errors.

    Raises:
        TypeError: it is none of these, or ``forward`` does not take it.
    """
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    if isinstance(given, Tensor):
        args, kwargs = (given,), {}
    elif isinstance(given, tuple):
        args, kwargs = given, {}
    elif isinstance(given, Mapping):
        args, kwargs = (), dict(given)
    else:
        raise TypeError(
            f"{what} must be a tensor, a tuple of positional arguments or a mapping of keyword arguments; "
            f"got {type(given).__name__}. input_fn may turn a batch into one of these"
        )
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise TypeError(
            f"{what} does not fit {type(model).__name__}.forward{signature}: {error}. input_fn may choose "
            f"from a batch what the model takes"
        ) from error
    if kwargs:
        args, kwargs = _by_position(signature, bound)
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(device), (args, kwargs))
    return Arguments(args, kwargs)


def _by_position(
    signature: inspect.Signature, bound: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Bound keywords as positional arguments, with defaults before the last of them, and what is left."""
    candidates = [
        each for each in signature.parameters.values() if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    last = max((index for index, each in enumerate(candidates) if each.name in bound), default=-1)
    args = tuple(bound.get(each.name, each.default) for each in candidates[: last + 1])
    kwargs: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            kwargs.update(value)
        elif kind is inspect.Parameter.KEYWORD_ONLY:
            kwargs[name] = value
    return args, kwargs
