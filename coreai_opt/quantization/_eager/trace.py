"""One forward of a model, written down: which module calls which operation on which tensors."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from coreai_opt._transposed_weights import is_product, is_transposition
from coreai_opt.config.spec import CompressionSimulatorBase
from coreai_opt.export.parametrized import FinalizedWeight
from coreai_opt.quantization._eager.call_sites import Origin, origin_of
from coreai_opt.quantization._eager.operations import FUNCTIONS, argument_name, function_name, is_counted

__all__ = [
    "Call",
    "Identity",
    "ModuleTrace",
    "Operand",
    "State",
    "Trace",
    "compressions_of",
    "is_quantizable",
    "trace_forward",
]

# A tensor object and how often it was written to: what an operation in place leaves is another tensor.
Identity = tuple[int, int]


def is_quantizable(value: object) -> bool:
    """Whether it is a tensor that a simulator can serve: floating point, of more than one element."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1


@dataclass(frozen=True)
class State:
    """A parameter or buffer, where a module owns it; ``rank`` orders those of a model."""

    module: nn.Module
    module_name: str
    name: str
    rank: int


@dataclass(frozen=True)
class Operand:
    """A tensor that a call receives.

    Attributes:
        position: the place among the arguments; for a keyword, the place that the signature gives it.
        name: what the signature calls it.
        is_keyword: whether it was passed by its name.
        identity: of the tensor after the call, for as long as the trace runs.
        is_quantizable: whether a simulator can serve it.
        device: where it lies.
        owners: the modules that own it, if it is a parameter or buffer of the model.
    """

    position: int
    name: str
    is_keyword: bool
    identity: Identity
    is_quantizable: bool
    device: torch.device
    owners: tuple[State, ...] = ()


@dataclass(frozen=True)
class Call:
    """One call of an operation in a module's forward.

    Attributes:
        function: the function, as torch reports it.
        operation: its name.
        index: how many calls of the operation came before it in the forward.
        position: how many of these are counted (``is_counted``); None if it is not itself.
        operands: the tensors it receives.
        results: identity and device of each tensor it returns, None for what no simulator can serve.
    """

    function: Callable[..., Any]
    operation: str
    index: int
    position: int | None
    operands: tuple[Operand, ...]
    results: tuple[tuple[Identity, torch.device] | None, ...]

    @property
    def label(self) -> str:
        """Its name within the forward: ``add``, then ``add_1``, and so on."""
        return f"{self.operation}_{self.index}" if self.index else self.operation


@dataclass
class ModuleTrace:
    """The calls of a module's forwards; of each, the calls that earlier ones had not.

    Attributes:
        module: the module.
        name: its name in the model.
        calls: those that may get simulators, by their labels.
        counts: how often a forward calls each operation, by those calls that are counted.
        origins: where in the source these calls are.
    """

    module: nn.Module
    name: str
    calls: dict[str, Call] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    origins: dict[str, list[Origin | None]] = field(default_factory=dict)


@dataclass
class Trace:
    """The calls of all modules, by module, in the order of their first calls.

    Attributes:
        modules: what each module called.
        inputs: modules and the tensors that they received, in the order of the calls: pairs of flattened
            position and identity.
        outputs: modules and the tensors that they returned, in the order of the returns.
    """

    modules: dict[nn.Module, ModuleTrace] = field(default_factory=dict)
    inputs: list[tuple[str, list[tuple[int, Identity]]]] = field(default_factory=list)
    outputs: list[tuple[str, list[tuple[int, Identity]]]] = field(default_factory=list)


class _Frame:
    """A forward in progress; ``is_bounded`` in and below a module whose boundaries are asked for."""

    def __init__(self, trace: ModuleTrace, is_bounded: bool, caller: FrameType) -> None:
        self.trace = trace
        self.is_bounded = is_bounded
        self.caller = caller
        self.counts: dict[str, int] = {}
        self.origins: dict[str, list[Origin | None]] = {}

    def count(self, operation: str, frame: FrameType, counted: bool) -> tuple[int, int | None]:
        """The number of calls before this one, which ``frame`` makes: of all, and of the counted."""
        index = self.counts.get(operation, 0)
        self.counts[operation] = index + 1
        if not counted:
            return index, None
        origins = self.origins.setdefault(operation, [])
        origins.append(origin_of(frame, self.caller))
        return index, len(origins) - 1


class _Recorder(TorchFunctionMode):
    """Writes down the calls of torch functions."""

    def __init__(self, model: nn.Module, boundaries: frozenset[str]) -> None:
        super().__init__()
        self.trace = Trace()
        self.boundaries = boundaries
        self.frames: list[_Frame] = []
        # Identities stay unique while the tensors live.
        self.kept: list[Tensor] = []
        self.owners: dict[int, tuple[State, ...]] = {}
        # Of their transposed views, which are weights where they are multiplied from the right.
        self.transposed: dict[int, tuple[State, ...]] = {}
        self.rank = 0
        for module_name, module in model.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self.own(tensor, module, module_name, name)

    def own(self, tensor: Tensor, module: nn.Module, module_name: str, name: str) -> None:
        """Take the tensor as a state of the module."""
        known = self.owners.get(id(tensor), ())
        if all(state.module is not module or state.name != name for state in known):
            self.owners[id(tensor)] = (*known, State(module, module_name, name, self.rank))
            self.rank += 1

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operation = function_name(func) if self.frames else None
        result = func(*args, **kwargs)
        if is_transposition(func) and args and id(args[0]) in self.owners and result.dim() == 2:
            self.kept.append(result)
            self.transposed[id(result)] = self.owners[id(args[0])]
        if operation is None:
            return result
        frame = self.frames[-1]
        index, position = frame.count(operation, sys._getframe(1), is_counted(func, args, kwargs))
        operands = self._operands(func, args, kwargs)
        outputs = result if isinstance(result, tuple | list) else (result,)
        if func not in FUNCTIONS and not frame.is_bounded:
            # Only the parameters and buffers that it reads matter.
            operands, outputs = tuple(operand for operand in operands if operand.owners), ()
        if operands:
            results = tuple(
                (self._identity(value), value.device) if is_quantizable(value) else None for value in outputs
            )
            call = Call(func, operation, index, position, operands, results)
            frame.trace.calls.setdefault(call.label, call)
        return result

    def _operands(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Operand, ...]:
        found = [
            self._operand(func, position, argument_name(func, position, len(args)), False, value)
            for position, value in enumerate(args)
            if isinstance(value, Tensor)
        ]
        names = [argument_name(func, position, len(args)) for position in range(len(args) + len(kwargs))]
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and name != "out":
                position = names.index(name) if name in names else len(args)
                found.append(self._operand(func, position, name, True, value))
        return tuple(found)

    def _operand(self, func: Any, position: int, name: str, is_keyword: bool, value: Tensor) -> Operand:
        owners = self.owners.get(id(value), ())
        quantizable = is_quantizable(value)
        if not owners and position == 1 and is_product(func):
            owners = self.transposed.get(id(value), ())
        return Operand(position, name, is_keyword, self._identity(value), quantizable, value.device, owners)

    def _identity(self, tensor: Tensor) -> Identity:
        if self.boundaries:
            self.kept.append(tensor)
        with torch._C.DisableTorchFunction():
            return id(tensor), 0 if tensor.is_inference() else tensor._version

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward begins."""
        trace = self.trace.modules.setdefault(module, ModuleTrace(module, name))
        if name in self.boundaries:
            self.trace.inputs.append((name, self._tensors_in(args)))
        is_bounded = name in self.boundaries or bool(self.frames and self.frames[-1].is_bounded)
        # This function, the hook, a closure of nn.Module._call_impl, nn.Module._call_impl.
        self.frames.append(_Frame(trace, is_bounded, sys._getframe(3)))

    def leave(self, name: str, module: nn.Module, result: Any) -> None:
        """It ends; ``result`` is None if by an exception."""
        if not self.frames or self.frames[-1].trace.module is not module:
            return  # a hook failed before the forward began
        frame = self.frames.pop()
        for operation, origins in frame.origins.items():
            if operation not in frame.trace.counts:
                frame.trace.counts[operation] = len(origins)
                frame.trace.origins[operation] = origins
        self.returned(name, result)

    def returned(self, name: str, result: Any) -> None:
        if name in self.boundaries:
            self.trace.outputs.append((name, self._tensors_in(result)))

    def _tensors_in(self, structure: Any) -> list[tuple[int, Identity]]:
        tensors = [leaf for leaf in pytree.tree_leaves(structure) if isinstance(leaf, Tensor)]
        return [(index, self._identity(tensor)) for index, tensor in enumerate(tensors)]


class _Compressed:
    """Hooks of parametrizations that compress: what they return is the module's state."""

    def __init__(self, recorder: _Recorder, owner: tuple[nn.Module, str, str]) -> None:
        self.recorder = recorder
        self.owner = owner
        self.outside: list[list[_Frame]] = []

    def before(self, *_: Any) -> None:
        self.outside.append(self.recorder.frames)
        self.recorder.frames = []

    def after(self, module: nn.Module, args: Any, result: Any) -> None:
        self.recorder.frames = self.outside.pop()
        if isinstance(result, Tensor):
            self.recorder.kept.append(result)
            self.recorder.own(result, *self.owner)


def compressions_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, ParametrizationList]]:
    """The parametrizations that compress: with the module, its name, and the name of the tensor."""
    for module_name, module in model.named_modules():
        if is_parametrized(module):
            for name, chain in module.parametrizations.items():  # type: ignore[operator, union-attr]
                if any(isinstance(each, CompressionSimulatorBase | FinalizedWeight) for each in chain):
                    yield module, module_name, name, chain


def trace_forward(model: nn.Module, inputs: Sequence[Any], boundaries: frozenset[str]) -> Trace:
    """Run the model once and write down what it calls.

    Args:
        model: the model, in the mode in which it is to run.
        inputs: positional arguments.
        boundaries: names of the modules whose inputs and outputs are asked for.
    """
    recorder = _Recorder(model, boundaries)
    handles: list[RemovableHandle] = []
    unseen: set[nn.Module] = set()

    def hook(module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> None:
        # Next to the forward, inside of the hooks of others.
        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after, prepend=True, always_call=True))

    try:
        for owner, owner_name, name, chain in compressions_of(model):
            unseen.update(chain.modules())
            compressed = _Compressed(recorder, (owner, owner_name, name))
            hook(chain, compressed.before, compressed.after)
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule) and module not in unseen:
                hook(
                    module,
                    lambda module, args, name=name: recorder.enter(name, module, args),
                    lambda module, args, result, name=name: recorder.leave(name, module, result),
                )
        with torch.no_grad(), recorder:
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.trace
