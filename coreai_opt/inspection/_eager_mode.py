"""One forward of a model as it runs: which module calls which torch function on which tensors."""

import linecache
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, type_before_parametrizations
from torch.overrides import TorchFunctionMode, get_overridable_functions, resolve_name
from torch.utils._pytree import tree_leaves

from coreai_opt._call_inputs import Arguments
from coreai_opt._state_tensors import side_effects_undone
from coreai_opt.config.spec import CompressionSimulatorBase
from coreai_opt.inspection._tree import build_tree, qualified_type
from coreai_opt.inspection.types import (
    BoundaryEdge,
    InputEdge,
    ModuleContext,
    ModuleInfo,
    OpInfo,
    SourceFrame,
)

__all__ = ["inspect_eager"]

Function = Callable[..., Any]
_ATTRIBUTE_ACCESS = ("__get__", "__set__", "__delete__")


def inspect_eager(
    model: nn.Module, arguments: Arguments, op_types: Mapping[Function, str] | None
) -> ModuleInfo:
    """Run the model once and return its modules with what they called.

    Args:
        model: is left as it was; its train or eval mode is kept during the forward.
        arguments: those of the forward.
        op_types: the functions to list, and their types; None to list all.
    """
    recorder = _Recorder(model, op_types)
    with _hooks(model, recorder), side_effects_undone(model), torch.no_grad():
        recorder.enter_model([*arguments.args, *arguments.kwargs.values()])
        with recorder:
            result = model(*arguments.args, **arguments.kwargs)
        recorder.leave_model(result)
    return recorder.tree()


@cache
def _recorded_functions() -> frozenset[Function]:
    """What torch lets a mode see, without the reading and writing of attributes."""
    found: set[Function] = set()
    for functions in get_overridable_functions().values():
        found.update(each for each in functions if getattr(each, "__name__", "") not in _ATTRIBUTE_ACCESS)
    return frozenset(found)


@cache
def _base_name(function: Function) -> str:
    return (resolve_name(function) or function.__name__).rpartition(".")[2]


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@dataclass
class _Boundary:
    """What went into a module in its first call, and what came out: one edge for each tensor."""

    entered: list[InputEdge]
    left: list[InputEdge | None] = field(default_factory=list)


class _Recorder(TorchFunctionMode):
    """Writes down the calls of torch functions, each under the module whose forward makes it."""

    def __init__(self, model: nn.Module, op_types: Mapping[Function, str] | None) -> None:
        super().__init__()
        self.root = _context("", model)
        self.op_types = op_types
        self.ops: list[OpInfo] = []
        self.listed: list[OpInfo] = []
        self.boundaries: dict[str, _Boundary] = {}
        self.calls: dict[int, _Boundary] = {}
        self.stack: list[ModuleContext] = []
        # More than zero in a module's second call and in a simulator: what happens there is no operation.
        self.suspended = 0
        self.counts: dict[str, int] = {}
        self.untracked = 0
        self.edges: dict[int, InputEdge] = {}
        self.states: dict[int, InputEdge] = {}
        for name, tensor in _state_names(model):
            self.states.setdefault(id(tensor), _edge(name, is_state=True))
        # The numbers in edges are identities for as long as the tensors live.
        self.kept: list[Any] = []

    def enter_model(self, example_inputs: Sequence[Any]) -> None:
        """Give the model's inputs their records."""
        inputs = _tensors(list(example_inputs))
        for index, tensor in enumerate(inputs):
            self._keep(tensor, _edge(f"input_{index}"))
        # Apple's package counts a tensor of unknown origin for each of the model's inputs.
        self.untracked = len(inputs)

    def leave_model(self, result: Any) -> None:
        """Give the model's results their records."""
        for index, tensor in enumerate(_tensors(result)):
            edge = self.edges.get(id(tensor))
            if edge is not None:
                _add_user(edge, _edge(f"output_{index}").op)

    def enter(self, context: ModuleContext, module: nn.Module, arguments: Any) -> None:
        """A forward begins."""
        if self.suspended or id(module) in self.calls or _is_transparent(module):
            self.suspended += 1
            return
        self.stack.append(context)
        boundary = _Boundary([self._edge_of(tensor) for tensor in _tensors(arguments)])
        self.calls[id(module)] = self.boundaries[context.module_name] = boundary

    def leave(self, module: nn.Module, arguments: Any, result: Any) -> None:
        """A forward ends."""
        if self.suspended:
            self.suspended -= 1
            if not self.suspended:
                self._take_over(module, _tensors(arguments), _tensors(result))
            return
        self.stack.pop()
        self.calls[id(module)].left = [self.edges.get(id(tensor)) for tensor in _tensors(result)]

    def _take_over(self, module: nn.Module, arguments: list[Tensor], result: list[Tensor]) -> None:
        """Give the results of a forward that was not recorded the producers that stand for them."""
        sources: list[InputEdge | None]
        if isinstance(module, ParametrizationList):
            sources = [self.states.get(id(tensor)) for tensor in module.parameters(recurse=False)][:1]
        elif _is_transparent(module):
            sources = [self._edge_of(tensor) for tensor in arguments[:1]]
        else:
            sources = self.calls[id(module)].left
        for tensor, source in zip(result, sources, strict=False):
            # A tensor that passed through, as in Identity, has its own producer already.
            if source is not None and id(tensor) not in self.edges and id(tensor) not in self.states:
                self._keep(tensor, source)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.suspended or not self.stack or func not in _recorded_functions():
            return func(*args, **(kwargs or {}))
        tensors = _tensors((args, list((kwargs or {}).values())))
        versions = [tensor._version for tensor in tensors]
        op = self._record(func, tensors)
        result = func(*args, **(kwargs or {}))
        for tensor, version in zip(tensors, versions, strict=True):
            if tensor._version != version:
                self._keep(tensor, InputEdge(op, 0))
        for slot, tensor in enumerate(_tensors(result)):
            self._keep(tensor, InputEdge(op, slot))
        return result

    def _record(self, func: Function, tensors: list[Tensor]) -> OpInfo:
        base = _base_name(func)
        name = f"{self.stack[-1].module_name}.{base}".removeprefix(".")
        count = self.counts[name] = self.counts.get(name, -1) + 1
        op_type = base if self.op_types is None else self.op_types.get(func, base)
        inputs = tuple(self._edge_of(tensor) for tensor in tensors)
        op = OpInfo(
            f"{name}_{count}" if count else name, op_type, tuple(self.stack), _frames(), inputs, {}, False
        )
        for edge in inputs:
            _add_user(edge, op)
        self.ops.append(op)
        if self.op_types is None or func in self.op_types:
            self.listed.append(op)
        return op

    def _edge_of(self, tensor: Tensor) -> InputEdge:
        edge = self.states.get(id(tensor)) or self.edges.get(id(tensor))
        if edge is None:
            edge = _edge(f"untracked_{self.untracked}")
            self.untracked += 1
            self._keep(tensor, edge)
        return edge

    def _keep(self, tensor: Tensor, edge: InputEdge) -> None:
        self.edges[id(tensor)] = edge
        self.kept.append(tensor)

    def tree(self) -> ModuleInfo:
        """The modules, with what crosses their boundaries."""
        modules = build_tree(self.root, self.ops)
        for name, boundary in self.boundaries.items():
            if name in modules:
                modules[name].output_ops = {
                    position: BoundaryEdge(edge.op, edge.output_idx or 0)
                    for position, edge in enumerate(boundary.left)
                    if edge is not None
                    and any(context.module_name == name for context in edge.op.module_stack)
                }
        positions = {name: _positions(boundary.entered) for name, boundary in self.boundaries.items()}
        for op in self.ops:
            for context in op.module_stack:
                entered = positions[context.module_name]
                for slot, edge in enumerate(op.inputs):
                    for position in entered.get((edge.op_name, edge.output_idx), ()):
                        inputs = modules[context.module_name].input_ops
                        inputs.setdefault(position, []).append(BoundaryEdge(op, slot))
        listed = set(self.listed)
        for module in modules.values():
            module.ops = [op for op in module.ops if op in listed]
            module.input_ops = dict(sorted(module.input_ops.items()))
        return modules[self.root.module_name]


def _positions(entered: list[InputEdge]) -> dict[tuple[str, int | None], list[int]]:
    """The positions of each tensor that enters a module; parameters are no inputs."""
    positions: dict[tuple[str, int | None], list[int]] = {}
    for position, edge in enumerate(entered):
        if not edge.is_state:
            positions.setdefault((edge.op_name, edge.output_idx), []).append(position)
    return positions


def _edge(name: str, is_state: bool = False) -> InputEdge:
    """An edge from a record of its own, which no operation makes."""
    return InputEdge(OpInfo(name, None, (), (), (), {}, is_state), None)


def _add_user(edge: InputEdge, user: OpInfo) -> None:
    slot = edge.output_idx or 0
    users = edge.op.outputs.get(slot, ())
    if user not in users:
        edge.op.outputs[slot] = (*users, user)


def _context(name: str, module: nn.Module) -> ModuleContext:
    return ModuleContext(name, qualified_type(type_before_parametrizations(module)))


def _is_transparent(module: nn.Module) -> bool:
    """Whether a module is part of a simulation: what it does is no operation of the model."""
    if isinstance(module, ParametrizationList):
        return any(isinstance(each, CompressionSimulatorBase) for each in module)
    return isinstance(module, CompressionSimulatorBase)


def _state_names(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers with their names; simulated ones have the name that they had before."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ParametrizationList):
            owner, _, attribute = prefix.rpartition(".")
            owner = owner.removesuffix("parametrizations")
            yield from ((owner + attribute, tensor) for tensor in module.parameters(recurse=False))
        else:
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    yield f"{prefix}.{name}".removeprefix("."), tensor


@contextmanager
def _hooks(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Let ``recorder`` know of each forward."""
    handles = []

    def watch(module: nn.Module, context: ModuleContext) -> None:
        def enter(module: nn.Module, args: Any) -> None:
            recorder.enter(context, module, args)

        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(recorder.leave))

    try:
        for name, module in model.named_modules():
            watch(module, _context(name, module))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _frames() -> tuple[SourceFrame, ...]:
    """The lines of the forwards that are running, the outermost first, up to the inspection's own frame."""
    frames = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not inspect_eager.__code__:
        code = frame.f_code
        if code.co_name == "forward":
            line = linecache.getline(code.co_filename, frame.f_lineno, frame.f_globals).strip()
            frames.append(SourceFrame(code.co_filename, frame.f_lineno, code.co_name, line))
        frame = frame.f_back
    return tuple(reversed(frames))
