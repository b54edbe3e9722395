"""Compressed models as files: which kind, and ONNX."""

import inspect
import logging
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreai_opt.common import ExportBackend
from coreai_opt.controllers.core.inputs import Batch
from coreai_opt.controllers.core.qdq import needs_4_bits
from coreai_opt.export.onnx_program import DEFAULT_OPSET, FIRST_OPSET_OF_4_BITS, exported, write_program

__all__ = [
    "BACKENDS",
    "export_lowered_model",
    "opset_of",
    "positional_arguments",
    "split_arguments",
    "suffix_of",
]

logger = logging.getLogger(__name__)

_OPSETS = range(18, 24)
_OLDEST_NAMED = 10
_FORMATS = {"coreai": ".aimodel", "coreml": ".mlpackage", "torch": ".pt2"}

BACKENDS = {
    ".aimodel": ExportBackend.CoreAI,
    ".mlpackage": ExportBackend.CoreML,
    ".pt2": ExportBackend.Torch,
}
"""For which backend a model is lowered to be written as a kind of file, by suffix."""


def opset_of(save_format: str | None) -> int | None:
    """The ONNX opset that a format names; None if it leaves that open.

    One from 10 on that is older than what can be written gives the oldest that can, with a warning.

    Raises:
        ValueError: it is neither ``onnx`` nor ``onnx_<opset>`` with such an opset.
    """
    if save_format in (None, "onnx"):
        return None
    match = re.fullmatch(r"onnx_(\d+)", save_format or "")
    if match and int(match[1]) in _OPSETS:
        return int(match[1])
    if match and _OLDEST_NAMED <= int(match[1]) < _OPSETS[0]:
        logger.warning("save_format %s: written with opset %d, the oldest there is", save_format, _OPSETS[0])
        return _OPSETS[0]
    raise ValueError(
        f"save_format must be {', '.join(map(repr, _FORMATS))}, 'onnx' or 'onnx_<opset>' with an opset from "
        f"{_OLDEST_NAMED} to {_OPSETS[-1]}; got {save_format!r}"
    )


def suffix_of(save_format: str | None, save_path: str | Path) -> str | None:
    """The suffix of the kind of file that a format names, or without a format, the path; None for ONNX.

    Raises:
        ValueError: the format is unknown, or the path has another suffix.
    """
    suffix = Path(save_path).suffix
    if save_format is None:
        return suffix if suffix in BACKENDS else None
    if save_format not in _FORMATS:
        opset_of(save_format)
        return None
    if suffix != _FORMATS[save_format]:
        raise ValueError(
            f"save_path must end in {_FORMATS[save_format]} for save_format {save_format!r}; got "
            f"{str(save_path)!r}"
        )
    return suffix


def positional_arguments(
    model: nn.Module, example: Batch, model_args: tuple[Any, ...] | None
) -> tuple[Any, ...]:
    """Arguments of a forward, all of them positional, on the CPU; see :func:`export_lowered_model`.

    Raises:
        ValueError: some cannot be.
    """
    extra, kwargs = split_arguments(model_args)
    args, defaults = example
    bound = inspect.signature(model.forward).bind(*args, *extra, **{**defaults, **kwargs})
    if bound.kwargs:
        raise ValueError(
            f"model_args: this save_format takes positional arguments alone; {sorted(bound.kwargs)} are not. "
            f"Wrap the model in a module whose forward takes them in their order"
        )
    return pytree.tree_map_only(Tensor, Tensor.cpu, bound.args)  # type: ignore[no-any-return]


def split_arguments(model_args: tuple[Any, ...] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: the last of ``model_args`` is always the dict of the latter.

    Raises:
        ValueError: it is not.
    """
    if model_args is None:
        return (), {}
    if not isinstance(model_args, tuple) or not model_args or not isinstance(model_args[-1], dict):
        raise ValueError(
            f"model_args must be a tuple whose last element is the dict of keyword arguments, as in "
            f"(a, b, {{}}); got {type(model_args).__name__} "
            f"{tuple(type(each).__name__ for each in model_args) if isinstance(model_args, tuple) else ''}"
        )
    return model_args[:-1], model_args[-1]


def export_lowered_model(
    model: nn.Module,
    example: Batch,
    save_path: str | Path,
    opset: int | None,
    input_names: list[str] | None,
    output_names: list[str] | None,
    model_args: tuple[Any, ...] | None,
) -> None:
    """Write a model that is expressed in ONNX's operators, and may have pairs of :mod:`.qdq`.

    Args:
        model: in evaluation mode.
        example: arguments of a forward. Positional ``model_args`` are added to them; those that are named
            replace them.
        save_path: where to.
        opset: see :func:`opset_of`; None for the one that the model needs.
        input_names: names of the graph's inputs.
        output_names: names of the graph's outputs.
        model_args: positional arguments, followed by a dict of those that are named.

    Raises:
        ValueError: the opset has no integers of the model's widths, or the arguments do not end in a
            dict.
    """
    extra, kwargs = split_arguments(model_args)
    args, defaults = example
    if opset is None:
        opset = FIRST_OPSET_OF_4_BITS if needs_4_bits(model) else DEFAULT_OPSET
    if opset < FIRST_OPSET_OF_4_BITS and needs_4_bits(model):
        raise ValueError(
            f"save_format: opset {opset} has no 4-bit integers; use 'onnx_{FIRST_OPSET_OF_4_BITS}' or later"
        )
    arguments = (*args, *extra), {**defaults, **kwargs}
    write_program(exported(model, *arguments, opset, input_names, output_names), Path(save_path))
