"""Forwards that pass the tensors of their operations through simulators.

A forward is replaced on the module itself (``module.forward``), so it is found wherever the module is called.
A module of torch that calls a single operation gets a :class:`LeafForward`, which needs no interception: it
simulates before and behind the forward. Others get a :class:`ScopeForward`: while it runs, torch reports each
call of a function, and the calls are recognised by their order.
"""

import copy
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from coreai_opt.config.spec.compression_simulator import is_simulating
from coreai_opt.quantization._eager.call_sites import CallGroup, Site

__all__ = ["WITH_SHORTCUT", "LeafForward", "ReplacedForward", "ScopeForward", "is_intercepting"]

# The method by which torch.nn.parallel copies a module for a device.
_REPLICATE = "_replicate_for_data_parallel"

# Modules whose forward takes a shortcut around their submodules unless functions are intercepted.
WITH_SHORTCUT = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


class _Frame:
    """A forward in progress: how often it has called each operation."""

    __slots__ = ("counts", "groups", "module")

    def __init__(
        self, module: nn.Module, groups: dict[Callable[..., Any], CallGroup], operations: int
    ) -> None:
        self.module = module
        self.groups = groups
        self.counts = [0] * operations


class _Interception(TorchFunctionMode):
    """Hands the functions that a forward calls to the simulators of its module."""

    def __init__(self) -> None:
        super().__init__()
        self.frame: _Frame | None = None

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        frame = self.frame
        if frame is not None and not is_simulating():
            group = frame.groups.get(func)
            if group is not None:
                count = frame.counts[group.slot]
                frame.counts[group.slot] = count + 1
                if count < len(group.sites):
                    site = group.sites[count]
                    if site is not None:
                        return site.run(frame.module, func, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)


class _Active(threading.local):
    """The interception of the current thread."""

    mode: _Interception | None = None


_active = _Active()


def is_intercepting() -> bool:
    """Whether the current thread runs a forward that is intercepted."""
    return _active.mode is not None


class ReplacedForward:
    """Base of the forwards that are put on a module in place of its own.

    Holds the module weakly: a model that is dropped is freed at once, not when cycles are collected.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        # A forward that somebody else put on the instance; else the class's is looked up at each call.
        self._displaced: Callable[..., Any] | None = module.__dict__.get("forward")

    @property
    def module(self) -> nn.Module:
        """The module whose forward this is."""
        module = self._module()
        if module is None:
            raise ReferenceError("the module of this forward has been deleted")
        return module

    @property
    def inner(self) -> Callable[..., Any]:
        """The forward that this one replaces."""
        return self._displaced or type(self.module).forward.__get__(self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner)

    @property
    def __code__(self) -> types.CodeType:
        # torch.export looks up where a model's forward is defined.
        return self.inner.__code__

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._module = weakref.ref(state["_module"])

    def install(self) -> None:
        """Take the place of the module's forward."""
        own = self.module.__dict__
        own["forward"] = self
        own[_REPLICATE] = self.replicate

    def remove(self) -> None:
        """Give it back."""
        own = self.module.__dict__
        own.pop("forward", None)
        own.pop(_REPLICATE, None)
        if self._displaced is not None:
            own["forward"] = self._displaced
            if isinstance(self._displaced, ReplacedForward):
                own[_REPLICATE] = self._displaced.replicate

    def replicate(self) -> nn.Module:
        """What ``nn.DataParallel`` asks of the module: a replica, whose forward is the replica's."""
        module = self.module
        replica: nn.Module = getattr(type(module), _REPLICATE)(module)
        own = replica.__dict__
        del own["forward"]
        forward = self.of_replica(replica)
        if forward is not None:
            own["forward"] = forward
        return replica

    def of_replica(self, replica: nn.Module) -> Callable[..., Any] | None:
        """The forward for a replica of the module; None for that of its class."""
        forward: Any = copy.copy(self)
        forward._module = weakref.ref(replica)
        forward._displaced = self._displaced_of(replica)
        return forward  # type: ignore[no-any-return]

    def _displaced_of(self, replica: nn.Module) -> Callable[..., Any] | None:
        if isinstance(self._displaced, ReplacedForward):
            return self._displaced.of_replica(replica)
        return self._displaced

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._displaced is not None:
            return self._displaced(*args, **kwargs)
        return type(module).forward(module, *args, **kwargs)

    def _run_unseen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's forward, of whose calls the module outside does not count any."""
        mode = None if torch.compiler.is_compiling() else _active.mode
        if mode is None:
            return self._run(module, args, kwargs)
        outside, mode.frame = mode.frame, None
        try:
            return self._run(module, args, kwargs)
        finally:
            mode.frame = outside


class LeafForward(ReplacedForward):
    """The forward of a module that calls one operation, on its first argument."""

    def __init__(self, module: nn.Module, site: Site) -> None:
        super().__init__(module)
        self.input_name = site.inputs[0][2] if site.inputs else None
        self.output_name = site.outputs[0][1] if site.outputs else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward between the simulators."""
        module = self.module
        simulators: Any = module._modules
        if self.input_name is not None:
            if args:
                args = (simulators[self.input_name](args[0]), *args[1:])
            else:
                kwargs["input"] = simulators[self.input_name](kwargs["input"])
        result = self._run_unseen(module, args, kwargs)
        return result if self.output_name is None else simulators[self.output_name](result)


class ScopeForward(ReplacedForward):
    """The forward of any other module.

    Args:
        module: the module.
        name: its name, for messages.
        groups: the operations that are intercepted, by each function that performs them.
    """

    def __init__(self, module: nn.Module, name: str, groups: dict[Callable[..., Any], CallGroup]) -> None:
        super().__init__(module)
        self.name = name
        self.groups = groups
        self.by_slot = sorted({group.slot: group for group in groups.values()}.values(), key=_slot)
        self.intercepts = bool(groups) or isinstance(module, WITH_SHORTCUT)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward.

        Raises:
            RuntimeError: it called an operation more or less often than in the forward that was traced.
        """
        if not self.intercepts:
            return self._run_unseen(self.module, args, kwargs)
        mode = _active.mode
        if mode is not None:
            return self._run_in(mode, args, kwargs)
        mode = _active.mode = _Interception()
        _push_mode(mode)
        try:
            return self._run_in(mode, args, kwargs)
        finally:
            _active.mode = None
            _pop_mode()

    def _run_in(self, mode: _Interception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outside = mode.frame
        module = self.module
        frame = mode.frame = _Frame(module, self.groups, len(self.by_slot))
        try:
            result = self._run(module, args, kwargs)
        finally:
            mode.frame = outside
        for group, count in zip(self.by_slot, frame.counts, strict=True):
            if count != len(group.sites):
                raise RuntimeError(
                    f"the forward of {self.name or 'the model'!r} called {group.operation!r} {count} times; "
                    f"when it was prepared, {len(group.sites)} times. Simulators belong to calls by their "
                    f"order: prepare the model with example inputs that take this way, or leave "
                    f"{group.operation!r} out of the configuration of this module."
                )
        return result


def _slot(group: CallGroup) -> int:
    return group.slot
