"""The base of simulators."""

import threading
from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from coreai_opt._utils.registry_utils import ClassRegistryMixin

__all__ = ["CallCountingMode", "CompressionSimulatorBase", "Storage", "is_simulating"]


class Storage(NamedTuple):
    """What a simulator makes of a tensor as it would be stored.

    Attributes:
        value_bits: of each element; None for those that it had before.
        extra_bits: of what is stored beside the elements: scales, palettes.
        kept: how many elements are stored; None for all.
    """

    value_bits: float | None
    extra_bits: int
    kept: int | None


_function_modes = torch._C._len_torch_function_stack
_mode_at: Any = torch._C._get_function_stack_at
_call = nn.Module.__call__
_PLAIN = (torch.Tensor, nn.Parameter)


class CallCountingMode(TorchFunctionMode):
    """A mode that looks at the functions that a model calls: those that simulators call are none of them."""


class _Running(threading.local):
    """How many simulators the current thread is inside of, while a torch function mode is active."""

    def __init__(self) -> None:
        # Not a default of the class: torch.compile would guard on the attribute's absence, and then set it.
        self.simulators = 0


_running = _Running()


def is_simulating() -> bool:
    """Whether the current thread runs a simulator: the functions called now are none of the model's own."""
    return _running.simulators > 0


def _all_count_calls(modes: int) -> bool:
    return all(isinstance(_mode_at(index), CallCountingMode) for index in range(modes))


def _are_plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether no argument is of a subclass of tensors, which may have a torch function of its own."""
    return not kwargs and all(type(each) in _PLAIN for each in args)


class CompressionSimulatorBase(ClassRegistryMixin, nn.Module):
    """A module that maps a tensor to its compressed values, so that training takes compression in."""

    # Qualified name of the tensor, for messages. Who inserts the simulator into a model sets it.
    tensor_fqn: str = "<unknown>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, unseen by modes that count calls; compiled code tells by :func:`is_simulating`."""
        modes = _function_modes()
        if not modes:
            return _call(self, *args, **kwargs)
        compiles = torch.compiler.is_compiling() or torch.compiler.is_exporting()
        if not compiles and _are_plain(args, kwargs) and _all_count_calls(modes):
            with torch._C.DisableTorchFunction():
                return _call(self, *args, **kwargs)
        _running.simulators += 1
        try:
            return _call(self, *args, **kwargs)
        finally:
            _running.simulators -= 1

    def storage(self, original: torch.Tensor) -> Storage:
        """What is stored of ``original``, the tensor before compression.

        Raises:
            NotImplementedError: the class does not say.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say what it stores for {self.tensor_fqn!r}"
        )

    def right_inverse(self, tensor: torch.Tensor) -> torch.Tensor:
        """What torch calls where a compressed parameter is assigned: an error that says what to do.

        Raises:
            NotImplementedError: always; torch takes it for the identity while it registers a simulator.
        """
        raise NotImplementedError(
            f"{self.tensor_fqn!r} is compressed, and cannot be assigned. Tie weights and resize embeddings "
            f"before prepare, or after finalize; values are written into parametrizations.<name>.original"
        )

    @abstractmethod
    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Compressed values of ``tensor``, of its shape and dtype, through which gradients flow."""
