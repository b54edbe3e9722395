"""What a model's inputs look like, without their values: as plain data, and tensors made from it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from coreai_opt._call_inputs import Arguments

__all__ = ["arguments_from", "outline_of"]


# Elements of a mask at most.
_MASK = 1 << 16


def outline_of(arguments: Arguments) -> dict[str, Any]:
    """The structure of the arguments, with dtypes and shapes for tensors, in the types that JSON has.

    Masks, integers that are 0 or 1, have their values, too: models go other ways for other ones.
    """
    return {"args": _outline(tuple(arguments.args)), "kwargs": _outline(dict(arguments.kwargs))}


def _outline(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        if (
            not value.is_floating_point()
            and 0 < value.numel() <= _MASK
            and bool(((value == 0) | (value == 1)).all())
        ):
            digits = "".join(map(str, value.flatten().int().tolist()))
            return {"mask": [str(value.dtype).removeprefix("torch."), list(value.shape), digits]}
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    # Exactly these: a subclass, such as a named tuple or an output of transformers, is made otherwise.
    if type(value) in (tuple, list):
        return {type(value).__name__: [_outline(each) for each in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _outline(each) for key, each in value.items()}}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    return {"unknown": f"{type(value).__module__}.{type(value).__qualname__}"}


def arguments_from(outline: Mapping[str, Any], device: torch.device) -> Arguments:
    """Arguments with such an outline: floating-point tensors are 0, integers but masks are 1.

    Raises:
        ValueError: an argument was neither a tensor nor plain data.
    """
    return Arguments(_filled(outline["args"], device), _filled(outline["kwargs"], device))


def _filled(outline: Mapping[str, Any], device: torch.device) -> Any:
    [(form, content)] = outline.items()
    if form == "tensor":
        dtype = getattr(torch, content[0])
        return torch.full(content[1], 0 if dtype.is_floating_point else 1, dtype=dtype, device=device)
    if form == "mask":
        dtype, shape, digits = content
        values = torch.tensor([digit == "1" for digit in digits], device=device)
        return values.reshape(shape).to(getattr(torch, dtype))
    if form in ("tuple", "list"):
        return {"tuple": tuple, "list": list}[form](_filled(each, device) for each in content)
    if form == "dict":
        return {key: _filled(each, device) for key, each in content.items()}
    if form == "value":
        return content
    raise ValueError(f"one of the example inputs was a {content}, which cannot be made from its outline")
