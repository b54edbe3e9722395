"""Hooks that pass the tensors of a model's operations through simulators.

Hooks are around the *call* of a module, and hold names and positions but no module: its forward stays the
user's, who may replace, wrap, export or inspect it, and a copy or replica of the module works with its own
simulators.

A module of torch that calls a single operation gets a :class:`LeafHook`, which simulates before and behind
the forward. Others get a :class:`ScopeHook`: while they run, torch reports each call of a function to a
:class:`~torch.overrides.TorchFunctionMode`, and the calls are recognised by their place in
the source and by their order.
"""

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import _pop_mode, _push_mode

from coreai_kernels.imports import once_imported
from coreai_opt.config.spec.compression_simulator import CallCountingMode, is_simulating
from coreai_opt.quantization._eager.call_sites import CallGroup, Origin, Site, origin_of
from coreai_opt.quantization._eager.operations import as_method, is_counted

__all__ = ["WITH_SHORTCUT", "Hook", "LeafHook", "ScopeHook", "install", "is_intercepting", "remove_hooks"]

# Modules whose forward takes a shortcut around their submodules unless functions are intercepted.
WITH_SHORTCUT = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)

_Groups = Mapping[Callable[..., Any], CallGroup]
_NOTHING: _Groups = {}


class _Frame:
    """A module's call in progress.

    Attributes:
        module: the module.
        groups: the operations that are intercepted.
        calls: of each operation, how often it was called at each place in the source, by the slots of the
            groups.
        strangers: how many calls are at places where the traced forward had none.
        caller: the Python frame of the call; None in compiled code.
        outside: the call that this one is inside of.
    """

    __slots__ = ("caller", "calls", "counts", "groups", "module", "outside", "strangers")

    def __init__(
        self,
        module: nn.Module,
        groups: _Groups,
        slots: int,
        caller: FrameType | None,
        outside: "_Frame | None",
    ) -> None:
        self.module = module
        self.groups = groups
        self.counts = [0] * slots
        self.strangers = [0] * slots
        self.calls: list[dict[Origin, int]] = [{} for _ in range(slots)]
        self.caller = caller
        self.outside = outside

    def is_running(self) -> bool:
        """Whether the call has not ended: torch calls no hook after a KeyboardInterrupt."""
        if self.caller is None:
            return True
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.caller:
            frame = frame.f_back
        return frame is not None

    def site(self, group: CallGroup) -> Site | None:
        """What to do at a call of an operation, in compiled code: calls are recognised by their order."""
        count = self.counts[group.slot]
        self.counts[group.slot] = count + 1
        return group.sites[count] if count < len(group.sites) else None

    def site_at(self, group: CallGroup, frame: FrameType | None) -> Site | None:
        """What to do at a call that ``frame`` makes.

        A call is recognised by its place in the source, and by its order among those at this place: if there
        are more than when the forward was traced, by the last one. At other places, by its order.
        """
        if self.caller is None:
            return self.site(group)
        origin = origin_of(frame, self.caller)
        if origin is None:
            return None  # of a module that was put in afterwards, or the call has ended
        calls = self.calls[group.slot]
        repeated = calls.get(origin, 0)
        calls[origin] = repeated + 1
        positions = group.positions.get(origin)
        if positions is None:
            self.strangers[group.slot] += 1
            return self.site(group)
        self.counts[group.slot] += 1
        return group.sites[positions[min(repeated, len(positions) - 1)]]


class _Interception(CallCountingMode):
    """Hands the functions that a forward calls to the simulators of its module."""

    def __init__(self) -> None:
        super().__init__()
        self.frame: _Frame | None = None

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        frame = self.frame
        if torch.compiler.is_compiling():
            func, args = as_method(func, args)
            if func is torch.Tensor.unflatten:  # it calls its base class's, where dynamo gives up
                func = torch.unflatten
        if frame is not None and not is_simulating():
            group = frame.groups.get(func)
            if group is not None and is_counted(func, args, kwargs):
                compiling = torch.compiler.is_compiling()
                site = frame.site(group) if compiling else frame.site_at(group, sys._getframe(1))
                if site is not None:
                    return site.run(frame.module, func, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)


class _Active(threading.local):
    """The interception of the current thread."""

    def __init__(self) -> None:
        # Not a default of the class: see CompressionSimulatorBase's.
        self.mode: _Interception | None = None


_active = _Active()


def is_intercepting() -> bool:
    """Whether the current thread runs a forward that is intercepted."""
    return _active_mode() is not None


def _active_mode() -> _Interception | None:
    mode = _active.mode
    if mode is None or torch.compiler.is_compiling():
        return mode
    while mode.frame is not None and not mode.frame.is_running():
        mode.frame = mode.frame.outside
    if mode.frame is None:
        _take_off_stack(mode)
        return None
    return mode


def _take_off_stack(mode: _Interception) -> None:
    """End an interception that was left without its hooks, wherever torch's stack of modes has it."""
    _active.mode = None
    above = []
    while torch._C._len_torch_function_stack():
        top = _pop_mode()
        if top is mode:
            break
        above.append(top)
    for each in reversed(above):
        _push_mode(each)


def _enter(module: nn.Module, groups: _Groups, slots: int, opens: bool) -> None:
    """Begin a frame. To be called by a hook's method, which torch calls; see :func:`_leave`.

    Args:
        module: the module that is called.
        groups: the operations that are intercepted.
        slots: how many operations are counted.
        opens: whether interception begins here unless it is active.
    """
    mode = _active_mode()
    if mode is None:
        if not opens:
            return
        mode = _active.mode = _Interception()
        _push_mode(mode)
    # This function, the method, a closure of nn.Module._call_impl, nn.Module._call_impl.
    caller = None if torch.compiler.is_compiling() else sys._getframe(3)
    mode.frame = _Frame(module, groups, slots, caller, mode.frame)


def _leave(module: nn.Module) -> _Frame | None:
    """End the frame that :func:`_enter` began for this call; the frame, unless an exception ends the call."""
    mode = _active_mode()
    frame = None if mode is None else mode.frame
    if mode is None or frame is None or frame.module is not module:
        return None
    is_failing = False
    if not torch.compiler.is_compiling() and frame.caller is not None:
        # After an exception, torch calls hooks from nn.Module._call_impl itself.
        caller = sys._getframe(2)
        is_failing = caller is frame.caller
        if not is_failing and caller.f_back is not frame.caller:
            return None  # an earlier hook failed before the frame began; this one is of a call outside
    mode.frame = frame.outside
    if mode.frame is None:
        _active.mode = None
        _pop_mode()
    return None if is_failing else frame


class Hook:
    """Base of the hooks: one object is a module's pre-hook (:meth:`before`) and hook (:meth:`after`)."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        return self  # names and positions only: true of a module's copy, too

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What the forward gets in place of its arguments; None for the same."""
        raise NotImplementedError

    def after(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        """What the call returns in place of the forward's result; None for the same."""
        raise NotImplementedError


class LeafHook(Hook):
    """Of a module that calls one operation, on its first argument.

    Args:
        input_name: the name of the argument's simulator in the module; None for none.
        output_name: the same for the result.
    """

    def __init__(self, input_name: str | None, output_name: str | None) -> None:
        self.input_name = input_name
        self.output_name = output_name

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Simulate the argument. What is called from here on does not count for the module outside."""
        _enter(module, _NOTHING, 0, opens=False)
        if self.input_name is None:
            return None
        simulators: Any = module._modules
        if args:
            return (simulators[self.input_name](args[0]), *args[1:]), kwargs
        if "input" in kwargs:
            return args, {**kwargs, "input": simulators[self.input_name](kwargs["input"])}
        return None

    def after(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        """Simulate the result."""
        simulators: Any = module._modules
        try:
            if self.output_name is None or result is None:  # there is no result where the forward failed
                return None
            return simulators[self.output_name](result)
        finally:
            _leave(module)


class ScopeHook(Hook):
    """Of any other module.

    Args:
        name: the module's name, for messages.
        groups: the operations that are intercepted, by each function that performs them.
        intercepts: whether functions are intercepted although no operation is simulated.
    """

    def __init__(self, name: str, groups: _Groups, intercepts: bool = False) -> None:
        self.name = name
        self.groups = groups
        self.by_slot = sorted({group.slot: group for group in groups.values()}.values(), key=_slot)
        self.intercepts = bool(groups) or intercepts

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count operations from here on for this module."""
        _enter(module, self.groups, len(self.by_slot), self.intercepts)

    def after(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """Count for the module outside again.

        Raises:
            RuntimeError: an operation was called more or less often than in the forward that was traced, and
                not at the same places in the source.
        """
        frame = _leave(module)
        if frame is None:
            return
        for group, count in zip(self.by_slot, frame.counts, strict=True):
            is_known = frame.calls[group.slot] and not frame.strangers[group.slot]
            if count not in (0, len(group.sites)) and not is_known:
                raise RuntimeError(
                    f"the forward of {self.name or 'the model'!r} called {group.operation!r} {count} times; "
                    f"when it was prepared, {len(group.sites)} times. They are not where the calls "
                    f"were then: prepare the model with example inputs that take this way, or leave "
                    f"{group.operation!r} out of the configuration of this module."
                )


def _slot(group: CallGroup) -> int:
    return group.slot


def install(hook: Hook, module: nn.Module) -> None:
    """Put the hook on the module: next to the forward, inside of all hooks that are there."""
    module.register_forward_pre_hook(hook.before, with_kwargs=True)
    module.register_forward_hook(hook.after, prepend=True, always_call=True)


# torch.compile traces the hooks as part of a model. Compiled by themselves, which happens where a graph
# breaks, they would not change the stack of modes.
def _compile_not_alone(eval_frame: ModuleType) -> None:
    for function in (_enter, _leave, LeafHook.before, LeafHook.after, ScopeHook.before, ScopeHook.after):
        eval_frame.skip_code(function.__code__)


once_imported("torch._dynamo.eval_frame", _compile_not_alone)


def remove_hooks(model: nn.Module) -> None:
    """Take the hooks off all modules."""
    for module in model.modules():
        for hooks, *kinds in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_always_called),
        ):
            ours = [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Hook)]
            for key in ours:
                for table in (hooks, *kinds):
                    del table[key]  # type: ignore[attr-defined]
