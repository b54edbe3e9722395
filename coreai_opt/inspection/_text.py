"""An inspection as text: the tree of modules, their operations, and what passes between them."""

import os
from collections.abc import Iterable, Mapping
from typing import Literal

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from coreai_opt.inspection.types import BoundaryEdge, InputEdge, ModuleInfo, OpInfo, SourceFrame

__all__ = ["summary_text"]

_NOTHING = "(no compressible operations found)"
_LIBRARY_PATHS = ("torch/nn/modules/", "torch/nn/functional", "torch/_")
_OP, _TYPE, _MODULE, _MODULE_TYPE, _DIM = "bold cyan", "yellow", "green", "magenta", "dim"

_LEGEND = (
    ("op inputs:", "{I: producer[N]}", "I is the key of op_input_spec, N the producer's output"),
    ("op states:", "name", "parameters and buffers that the operation reads"),
    ("op outputs:", "{N: [consumer]}", "N is the key of op_output_spec"),
    ("untracked_N", "", "a tensor that no recorded operation made, such as a plain attribute"),
    ("module inputs:", "{I: [op[N]]}", "I is the key of module_input_spec, N the input of op that reads it"),
    ("module outputs:", "{I: op[N]}", "I is the key of module_output_spec, N the output of op"),
)


def summary_text(root: ModuleInfo, colorize: bool | None) -> str:
    """The tree below ``root``, as wide as the terminal.

    Args:
        root: the model.
        colorize: None for what the terminal can do, False for plain text, True for ANSI colours everywhere.
    """
    if not root.all_ops() and not root.child_modules:
        return _NOTHING
    colors: dict[bool | None, Literal["auto", "standard"] | None] = {
        None: "auto",
        False: None,
        True: "standard",
    }
    console = Console(force_terminal=colorize, color_system=colors[colorize], highlight=False)
    tree = Tree(_root_label(root))
    _grow(tree, root)
    with console.capture() as capture:
        console.print(_legend())
        console.print()
        console.print(tree)
    return capture.get().rstrip("\n")


def _legend() -> Text:
    legend = Text("Legend:\n  ■ module_name (module_type)  ◆ op_name [op_type]\n")
    for label, form, meaning in _LEGEND:
        legend.append(f"\n  {label:16}{form:17}{meaning}")
    return legend


def _grow(tree: Tree, module: ModuleInfo) -> None:
    for child in module.children():
        _grow(tree.add(_module_label(child)), child)
    for op in module.ops:
        tree.add(_op_label(op))


def _root_label(root: ModuleInfo) -> Text:
    label = Text()
    if root.module_name:
        label.append("■ ")
        label.append(f"{root.module_name} ", _MODULE)
    label.append(f"({root.module_type})", _MODULE_TYPE)
    return _with_boundaries(label, root)


def _module_label(module: ModuleInfo) -> Text:
    label = Text("■ ")
    label.append(module.module_name, _MODULE)
    label.append(" ")
    label.append(f"({module.module_type})", _MODULE_TYPE)
    return _with_boundaries(label, module)


def _with_boundaries(label: Text, module: ModuleInfo) -> Text:
    if module.input_ops:
        entries = {
            position: _listed(_boundary(edge) for edge in edges)
            for position, edges in module.input_ops.items()
        }
        label.append(f"\n    module inputs:  {_mapping(entries)}", _DIM)
    if module.output_ops:
        entries = {position: _boundary(edge) for position, edge in module.output_ops.items()}
        label.append(f"\n    module outputs: {_mapping(entries)}", _DIM)
    return label


def _op_label(op: OpInfo) -> Text:
    label = Text("◆ ")
    label.append(op.op_name, _OP)
    label.append(" ")
    label.append(f"[{op.op_type or '?'}]", _TYPE)
    inputs = {index: _producer(edge) for index, edge in enumerate(op.inputs) if not edge.is_state}
    if inputs:
        label.append(f"\n  op inputs:  {_mapping(inputs)}")
    states = [edge.op_name.rpartition(".")[2] for edge in op.inputs if edge.is_state]
    if states:
        label.append(f"\n  op states:  {', '.join(states)}")
    if op.outputs:
        outputs = {slot: _listed(user.op_name for user in users) for slot, users in op.outputs.items()}
        label.append(f"\n  op outputs: {_mapping(outputs)}")
    frame = _users_frame(op)
    if frame is not None:
        label.append(f"\n  filepath:  {_relative(frame.filename)}:{frame.lineno}", _DIM)
        label.append(f"\n  code:      {frame.code_context}", _DIM)
    return label


def _users_frame(op: OpInfo) -> SourceFrame | None:
    """The innermost line that is not torch's own."""
    for frame in reversed(op.source_frames):
        if not any(part in frame.filename.replace(os.sep, "/") for part in _LIBRARY_PATHS):
            return frame
    return None


def _relative(filename: str) -> str:
    here = os.getcwd() + os.sep
    return filename.removeprefix(here)


def _producer(edge: InputEdge) -> str:
    return edge.op_name if edge.output_idx is None else f"{edge.op_name}[{edge.output_idx}]"


def _boundary(edge: BoundaryEdge) -> str:
    return f"{edge.op.op_name}[{edge.index}]"


def _listed(items: Iterable[str]) -> str:
    return f"[{', '.join(items)}]"


def _mapping(entries: Mapping[int, str]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in entries.items()) + "}"
