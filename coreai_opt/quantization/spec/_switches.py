"""The switches of a fake quantizer: buffers that anybody may write, read without waiting for the device."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from coreai_kernels.imports import once_imported
from coreai_kernels.runtime import Generation
from coreai_opt.quantization.spec._generation import HasGeneration

__all__ = ["Flags", "SwitchableFakeQuantize"]


class _Switch:
    """The value of one buffer.

    On the CPU it is read where it lies, whoever wrote it and how. Elsewhere reading costs a wait for the
    device: there it is read again after the buffer became another tensor or its version counter moved.
    """

    __slots__ = ("_address", "_array", "_seen", "value")

    def __init__(self, value: bool) -> None:
        self.value = value
        self._seen: tuple[Tensor | None, int] = (None, -1)
        self._address = -1
        self._array: np.ndarray | None = None

    def adopt(self, buffer: Tensor | None) -> None:
        """Take it that the buffer, as it is now, holds the value."""
        # Inference tensors count no versions: never equal, so they are read each time.
        self._seen = (buffer, -1 if buffer is None or buffer.is_inference() else buffer._version)
        self._array = None
        if type(buffer) is Tensor and buffer.is_cpu and not _is_wrapped(buffer):
            self._address, self._array = buffer.data_ptr(), buffer.numpy()

    def update(self, buffer: Tensor | None) -> None:
        """Read the buffer, if that may tell something new."""
        if buffer is None:
            return
        array = self._array
        if array is not None and self._seen[0] is buffer and buffer.data_ptr() == self._address:
            self.value = bool(array.item())
            return
        seen, version = self._seen
        if seen is buffer and version >= 0 and version == buffer._version and array is None:
            return
        # Tensors without data keep what was known before they lost it.
        if _has_values(buffer):
            self.value = bool(buffer.item())
        self.adopt(buffer)


# A tensor that a transform of torch.func has wrapped, which has no memory of its own.
_is_wrapped: Any = torch._C._functorch.is_functorch_wrapped_tensor  # type: ignore[attr-defined]


def _has_values(buffer: Tensor) -> bool:
    return not (buffer.is_meta or isinstance(buffer, FakeTensor))


class Flags:
    """Mirror of a fake quantizer's flag buffers, which belong to the ``state_dict`` and rule.

    Attributes:
        thrown: a generation for each time that a switch was thrown by a method.
    """

    NAMES = ("_disabled", "fake_quant_enabled", "observer_enabled")

    __slots__ = ("_disabled", "_fake_quant", "_observe", "thrown")

    def __init__(self, disabled: bool = False, fake_quant: bool = True, observe: bool = True) -> None:
        self.thrown = Generation()
        self._disabled, self._fake_quant, self._observe = (
            _Switch(disabled),
            _Switch(fake_quant),
            _Switch(observe),
        )

    @property
    def disabled(self) -> bool:
        """Whether the tensor passes unchanged, for good."""
        return self._disabled.value

    @property
    def fake_quant(self) -> bool:
        """Whether the tensor is simulated."""
        return self._fake_quant.value

    @property
    def observe(self) -> bool:
        """Whether the tensor is observed."""
        return self._observe.value

    def _all(self) -> tuple[_Switch, _Switch, _Switch]:
        return self._disabled, self._fake_quant, self._observe

    def values(self) -> tuple[bool, bool, bool]:
        """The constructor's arguments for an equal mirror."""
        return self.disabled, self.fake_quant, self.observe

    def set(self, name: str, value: bool) -> None:
        """Mirror that the buffer of that name gets a value."""
        self._all()[self.NAMES.index(name)].value = value

    def adopt(self, buffers: dict[str, Tensor | None]) -> None:
        """Take it that the buffers, as they are now, hold the mirrored values."""
        for name, switch in zip(self.NAMES, self._all(), strict=True):
            switch.adopt(buffers[name])

    def update(self, buffers: dict[str, Tensor | None]) -> None:
        """Mirror the buffers as they are now."""
        self._disabled.update(buffers["_disabled"])
        self._fake_quant.update(buffers["fake_quant_enabled"])
        self._observe.update(buffers["observer_enabled"])


class FakeQuantizeBase(ABC, nn.Module):
    """What torchao's class of this name asks of a fake quantizer, whose instances count as torchao's, too."""

    fake_quant_enabled: Tensor
    observer_enabled: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Not bool: NCCL, which spreads buffers over processes, cannot send it.
        self.register_buffer("fake_quant_enabled", torch.ones(1, dtype=torch.uint8))
        self.register_buffer("observer_enabled", torch.ones(1, dtype=torch.uint8))

    @abstractmethod
    def forward(self, tensor: Tensor) -> Tensor:
        """Observe and simulate a tensor."""

    @abstractmethod
    def calculate_qparams(self) -> Any:
        """Return the parameters for what was observed."""


once_imported(
    "torchao.quantization.pt2e.fake_quantize",
    lambda module: module.FakeQuantizeBase.register(FakeQuantizeBase),
)


class SwitchableFakeQuantize(HasGeneration, FakeQuantizeBase):
    """A fake quantizer with switches that cost a forward no wait.

    The buffers ``fake_quant_enabled`` and ``observer_enabled`` (uint8, one element) switch simulation and
    observation; ``_disabled`` (bool) switches off both for good.
    """

    _disabled: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_disabled", torch.tensor(False))
        self._flags = Flags()
        self._flags.adopt(self._buffers)

    def is_disabled(self) -> bool:
        """Whether the tensor could not be cut into the blocks asked for, so that it passes unchanged."""
        return self._current_flags().disabled

    def _disable(self) -> None:
        self._write_flag("_disabled", True)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Switch simulation on or off."""
        self._write_flag("fake_quant_enabled", enabled)

    def disable_fake_quant(self) -> None:
        """Switch simulation off."""
        self.enable_fake_quant(False)

    def enable_observer(self, enabled: bool = True) -> None:
        """Switch observation on or off. Off, the parameters stay as they are."""
        self._write_flag("observer_enabled", enabled)

    def disable_observer(self) -> None:
        """Switch observation off."""
        self.enable_observer(False)

    def _current_flags(self) -> Flags:
        if not torch.compiler.is_compiling():
            self._flags.update(self._buffers)
        return self._flags

    def _write_flag(self, name: str, value: bool) -> None:
        before = self._current_flags().values()
        self._flags.set(name, bool(value))
        getattr(self, name).fill_(value)
        if not torch.compiler.is_compiling():
            self._flags.adopt(self._buffers)
            # Last: a forward in another thread that sees the old generation may have seen either value.
            if self._flags.values() != before:
                self._flags.thrown.advance()

    def _apply(self, fn: Any, recurse: bool = True) -> "SwitchableFakeQuantize":
        # Moving a module changes its buffers' identity, not their values: nothing to read on the device.
        self._flags.update(self._buffers)
        super()._apply(fn, recurse)
        self._flags.adopt(self._buffers)
        return self

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        # Replicas run in threads of their own.
        replica.__dict__["_flags"] = Flags(*self._flags.values())
        return replica

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._flags.update(self._buffers)

    def __getstate__(self) -> dict[str, Any]:
        self._flags.update(self._buffers)
        return {**self.__dict__, "_flags": self._flags.values()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_flags": Flags(*state["_flags"])})
        self._flags.adopt(self._buffers)
