"""The tensors that a program stores, and the nodes that stand for them and for its inputs."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from coreai_opt.casting._nodes import set_dtype

__all__ = ["replace_stored_tensors", "user_inputs"]

_STORED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def _placeholders(program: ExportedProgram) -> dict[str, fx.Node]:
    return {node.name: node for node in program.graph.nodes if node.op == "placeholder"}


def user_inputs(program: ExportedProgram) -> Iterator[fx.Node]:
    """The placeholders of what a caller passes."""
    nodes = _placeholders(program)
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT and spec.arg.name in nodes:
            yield nodes[spec.arg.name]


def replace_stored_tensors(program: ExportedProgram, replacement: Callable[[Tensor], Tensor]) -> None:
    """Replace parameters, buffers and constants; shared ones stay shared, parameters stay parameters.

    The tensors of the module that was exported are not written.
    """
    replaced: dict[int, Tensor] = {}

    def new(tensor: Tensor) -> Tensor:
        if id(tensor) not in replaced:
            found = replacement(tensor)
            if found is not tensor and isinstance(tensor, nn.Parameter):
                found = nn.Parameter(found, requires_grad=tensor.requires_grad)
            replaced[id(tensor)] = found
        return replaced[id(tensor)]

    for stored in (program.state_dict, program.constants):
        for name, tensor in list(stored.items()):
            if isinstance(tensor, Tensor):
                stored[name] = new(tensor)
    nodes = _placeholders(program)
    for spec in program.graph_signature.input_specs:
        if spec.kind in _STORED and spec.arg.name in nodes:
            tensor = _lookup(program, spec.target)
            if tensor is not None:
                set_dtype(nodes[spec.arg.name], lambda _, dtype=tensor.dtype: dtype)  # type: ignore[misc]


def _lookup(program: ExportedProgram, name: str | None) -> torch.Tensor | None:
    found = program.state_dict.get(name, program.constants.get(name)) if name is not None else None
    return found if isinstance(found, Tensor) else None
