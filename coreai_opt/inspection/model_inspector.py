"""Lists the operations of a model as a compressor sees them."""

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from coreai_opt._call_inputs import Arguments, example_arguments
from coreai_opt.inspection._eager_mode import inspect_eager
from coreai_opt.inspection._graph_mode import inspect_graph, quantizable_nodes
from coreai_opt.inspection._text import summary_text
from coreai_opt.inspection._tree import qualified_type
from coreai_opt.inspection.types import ModelSummary, OpInfo
from coreai_opt.palettization import KMeansPalettizer
from coreai_opt.palettization.kmeans._supported import OP_TYPES as PALETTIZED_FUNCTIONS
from coreai_opt.quantization import Quantizer
from coreai_opt.quantization._eager.operations import FUNCTIONS as QUANTIZED_FUNCTIONS
from coreai_opt.quantization._graph.export import export_model
from coreai_opt.quantization.config import ExecutionMode, InvalidExecutionModeError

__all__ = ["ModelInspector"]

Compressor = type[Quantizer] | type[KMeansPalettizer]


class ModelInspector:
    """The operations of a model, with the names, types and indices that configurations refer to them by.

    The model is traced once, when the inspector is made, and left as it was.

    Args:
        model: the model; in graph mode also an exported or traced ``GraphModule``, which is read as it is.
        example_inputs: positional arguments for one forward, or a mapping of keyword arguments; None only
            with a GraphModule in graph mode.
        execution_mode: ``"eager"`` for the model as it runs, ``"graph"`` for the graph exported from it.
        compressor: list only the operations that this compressor knows: ``Quantizer``, or in eager mode
            ``KMeansPalettizer``. None to list all.
        dynamic_shapes: for ``torch.export``, graph mode alone.
        export_with_no_grad: whether to export under ``torch.no_grad``, graph mode alone.

    Raises:
        TypeError: ``model`` is no module, or in eager mode a GraphModule; ``example_inputs`` is
            neither a tuple nor a mapping, or does not fit ``forward``.
        InvalidExecutionModeError: there is no such mode.
        ValueError: ``example_inputs`` is missing, or the compressor has no operations in this mode.
        RuntimeError: torch cannot export the model.
    """

    def __init__(
        self,
        model: nn.Module | fx.GraphModule,
        example_inputs: tuple[Any, ...] | Mapping[str, Any] | None,
        execution_mode: ExecutionMode | str,
        compressor: Compressor | None = None,
        dynamic_shapes: Any = None,
        export_with_no_grad: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module or a GraphModule; got {type(model).__name__}")
        if execution_mode not in list(ExecutionMode):
            raise InvalidExecutionModeError(execution_mode)
        mode = ExecutionMode(execution_mode)
        is_graph = isinstance(model, fx.GraphModule)
        arguments = Arguments((), {})
        if example_inputs is None:
            if not (is_graph and mode is ExecutionMode.GRAPH):
                raise ValueError(
                    "example_inputs must be a tuple of the model's positional arguments; None is for a "
                    "GraphModule with execution_mode='graph' alone"
                )
        else:
            arguments = example_arguments(model, example_inputs)
        _check_compressor(compressor, mode)
        if mode is ExecutionMode.EAGER:
            if is_graph:
                raise TypeError("model must be an nn.Module for execution_mode='eager'; got a GraphModule")
            _warn_of_graph_arguments(dynamic_shapes, export_with_no_grad)
            root = inspect_eager(model, arguments, _functions(compressor))
        else:
            if isinstance(model, fx.GraphModule):
                graph = model
            else:
                positional = tuple(arguments.args)
                graph = export_model(model, positional, dynamic_shapes, export_with_no_grad, arguments.kwargs)
            root_type = fx.GraphModule if is_graph else type(model)
            listed = None if compressor is None else quantizable_nodes(graph)
            root = inspect_graph(graph, root_type, listed)
        self._summary = ModelSummary(root, mode)

    @property
    def summary(self) -> ModelSummary:
        """The tree of modules with their operations, and the mode."""
        return self._summary

    def get_matched_ops_for_op_type(self, op_type: str) -> tuple[OpInfo, ...]:
        """The operations of that type, e.g. ``"linear"``: those that an ``op_type_config`` entry covers."""
        return self._matching(lambda op: op.op_type == op_type)

    def get_matched_ops_for_op_name(self, pattern: str) -> tuple[OpInfo, ...]:
        """The operations whose whole name matches a regular expression, as ``op_name_config`` has it.

        Raises:
            ValueError: ``pattern`` is no regular expression.
        """
        regex = _compiled("pattern", pattern)
        return self._matching(lambda op: regex.fullmatch(op.op_name) is not None)

    def get_matched_ops_for_module_name(self, module_name: str) -> tuple[OpInfo, ...]:
        """The operations in a module whose whole name matches a regular expression, or inside of it.

        Raises:
            ValueError: ``module_name`` is no regular expression.
        """
        regex = _compiled("module_name", module_name)
        return self._matching(
            lambda op: any(regex.fullmatch(context.module_name) for context in op.module_stack)
        )

    def get_matched_ops_for_module_type(self, module_type: type | str) -> tuple[OpInfo, ...]:
        """The operations in a module of exactly that class, or inside of it.

        Args:
            module_type: the class, or ``module.qualname`` of where it is defined, e.g.
                ``"torch.nn.modules.linear.Linear"``.

        Raises:
            TypeError: it is neither.
        """
        if not isinstance(module_type, type | str):
            raise TypeError(f"module_type must be a class or its name; got {module_type!r}")
        wanted = module_type if isinstance(module_type, str) else qualified_type(module_type)
        return self._matching(lambda op: any(context.module_type == wanted for context in op.module_stack))

    def format_summary(self, colorize: bool | None = None) -> str:
        """The tree as text.

        Args:
            colorize: None to colour it where it is written to a terminal, False never, True always.
        """
        return summary_text(self._summary.model, colorize)

    def _matching(self, matches: Callable[[OpInfo], bool]) -> tuple[OpInfo, ...]:
        return tuple(op for op in self._summary.model.all_ops() if matches(op))


def _check_compressor(compressor: Any, mode: ExecutionMode) -> None:
    if compressor is None:
        return
    supported = isinstance(compressor, type) and issubclass(compressor, Quantizer | KMeansPalettizer)
    if not supported:
        name = getattr(compressor, "__name__", repr(compressor))
        raise ValueError(f"compressor must be Quantizer, KMeansPalettizer, or None; got {name}")
    if mode is ExecutionMode.GRAPH and not issubclass(compressor, Quantizer):
        raise ValueError(
            f"compressor must be Quantizer or None with execution_mode='graph'; got {compressor.__name__}, "
            f"which works on modules: use execution_mode='eager'"
        )


def _functions(compressor: Compressor | None) -> dict[Any, str] | None:
    """The functions that a compressor knows in eager mode, and their types, in place or not."""
    if compressor is None:
        return None
    if issubclass(compressor, Quantizer):
        return {function: name.rstrip("_") for function, name in QUANTIZED_FUNCTIONS.items()}
    # torch reports the built-in functions where torch.nn.functional has other names for them.
    return {**PALETTIZED_FUNCTIONS, torch.nn.functional.linear: "linear"}


def _warn_of_graph_arguments(dynamic_shapes: Any, export_with_no_grad: bool) -> None:
    unused = {"dynamic_shapes": dynamic_shapes is not None, "export_with_no_grad": not export_with_no_grad}
    for name, is_set in unused.items():
        if is_set:
            warnings.warn(
                f"{name} has no effect in eager mode: it is for torch.export", UserWarning, stacklevel=3
            )


def _compiled(argument: str, pattern: str) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise TypeError(f"{argument} must be a regular expression; got {pattern!r}")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument} must be a regular expression; {pattern!r} is none: {error}") from None
