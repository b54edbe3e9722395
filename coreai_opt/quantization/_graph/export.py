"""From a model to a graph of aten operators that shares the model's parameters."""

import contextlib
import linecache
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

__all__ = ["export_model"]


def export_model(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    dynamic_shapes: Any = None,
    no_grad: bool = True,
    kwargs: Mapping[str, Any] | None = None,
) -> GraphModule:
    """Export ``model`` in the mode that it is in. Operators stay whole: nothing is decomposed.

    Args:
        model: is left as it is; the graph's parameters and buffers are the model's.
        example_inputs: positional arguments.
        dynamic_shapes: as for :func:`torch.export.export`.
        no_grad: whether to export under :class:`torch.no_grad`.
        kwargs: keyword arguments.

    Raises:
        RuntimeError: torch cannot export the model; the message says where, and what to try.
    """
    context = torch.no_grad() if no_grad else contextlib.nullcontext()
    try:
        with context:
            program = torch.export.export(
                model, example_inputs, dict(kwargs or {}), dynamic_shapes=dynamic_shapes
            )
            graph_module: Any = program.module(check_guards=False)
    except Exception as error:
        raise RuntimeError(_explain(model, error, no_grad)) from error
    return graph_module  # type: ignore[no-any-return]


def _explain(model: nn.Module, error: Exception, no_grad: bool) -> str:
    lines = [
        f"Graph mode needs torch.export, which cannot export {type(model).__name__}: "
        f"{type(error).__name__}: {_first_lines(error)}"
    ]
    place = _place_in_forward(error)
    if place is not None:
        lines.append(f"It happened at {place}")
    lines += [
        "What to try:",
        "- control flow or shapes that depend on values: rewrite that line with torch.where, torch.cond or "
        "fixed shapes;",
        "- sizes that change between calls: prepare(..., dynamic_shapes=...), see torch.export.Dim;",
        f"- prepare(..., export_with_no_grad={not no_grad}), where the forward switches gradients on or off;",
        "- eager mode, which needs no export: config.set_execution_mode('eager').",
    ]
    return "\n".join(lines)


def _first_lines(error: Exception, count: int = 2) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return "\n".join(lines[:count])


def _place_in_forward(error: Exception) -> str | None:
    """The innermost line outside of torch that was running."""
    found = None
    traceback = error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        module = str(traceback.tb_frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] not in ("torch", "contextlib", "coreai_opt"):
            line = linecache.getline(code.co_filename, traceback.tb_lineno).strip()
            found = f"{code.co_filename}:{traceback.tb_lineno}, in {code.co_qualname}: {line}"
        traceback = traceback.tb_next
    return found
