"""The switches of a fake quantizer: buffers that anybody may write, read without waiting for the device."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from coreai_opt._environment import quiet_torchao_import
from coreai_opt.quantization.spec._assignments import ReportsAssignments

with quiet_torchao_import():
    from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

__all__ = ["Flags", "SwitchableFakeQuantize"]


class Flags:
    """Mirror of a fake quantizer's flag buffers.

    The buffers belong to the ``state_dict`` and may be written by anybody, so they rule. Reading them costs a
    wait for the device; the mirror reads them only after they have changed, which a tensor's identity and its
    version counter tell on the host.
    """

    NAMES = ("_disabled", "fake_quant_enabled", "observer_enabled")

    __slots__ = ("_seen", "disabled", "fake_quant", "observe")

    def __init__(self, disabled: bool = False, fake_quant: bool = True, observe: bool = True) -> None:
        self.disabled = disabled
        self.fake_quant = fake_quant
        self.observe = observe
        self._seen: tuple[Any, ...] = (None, -1, None, -1, None, -1)

    def values(self) -> tuple[bool, bool, bool]:
        """The constructor's arguments for an equal mirror."""
        return self.disabled, self.fake_quant, self.observe

    def adopt(self, buffers: dict[str, torch.Tensor | None]) -> None:
        """Take it that the buffers, as they are now, hold the mirrored values."""
        seen: list[Any] = []
        for name in self.NAMES:
            tensor = buffers[name]
            # Inference tensors count no versions: never equal, so they are read each time.
            seen += (tensor, -1 if tensor is None or tensor.is_inference() else tensor._version)
        self._seen = tuple(seen)

    def update(self, buffers: dict[str, torch.Tensor | None]) -> None:
        """Read the buffers again if they have changed."""
        disabled, fake_quant, observe = map(buffers.__getitem__, self.NAMES)
        seen = self._seen
        try:
            if (
                seen[0] is disabled
                and seen[2] is fake_quant
                and seen[4] is observe
                and seen[1] == disabled._version
                and seen[3] == fake_quant._version
                and seen[5] == observe._version
            ):
                return
        except RuntimeError:  # inference tensors, which have no version
            pass
        tensors = [tensor for tensor in (disabled, fake_quant, observe) if tensor is not None]
        # Tensors without data keep what was known before they lost it.
        if not any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors):
            self.disabled, self.fake_quant, self.observe = (bool(tensor.item()) for tensor in tensors)
        self.adopt(buffers)


class SwitchableFakeQuantize(ReportsAssignments, FakeQuantizeBase):
    """torchao's base of fake quantizers, with switches that cost a forward no wait.

    The buffers ``fake_quant_enabled`` and ``observer_enabled`` (uint8, one element) switch simulation and
    observation; ``_disabled`` (bool) switches off both for good.
    """

    fake_quant_enabled: Tensor
    observer_enabled: Tensor
    _disabled: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_disabled", torch.tensor(False))
        self._flags = Flags()
        self._flags.adopt(self._buffers)
        # How often somebody chose between training and evaluation.
        self.mode_changes = 0

    def train(self, mode: bool = True) -> "SwitchableFakeQuantize":
        """Set training or evaluation mode, which makes no difference to the module itself."""
        self.mode_changes += 1
        return super().train(mode)

    def is_disabled(self) -> bool:
        """Whether the tensor could not be cut into the blocks asked for, so that it passes unchanged."""
        return self._current_flags().disabled

    def _disable(self) -> None:
        self._current_flags().disabled = True
        self._write_flag(self._disabled, True)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Switch simulation on or off."""
        self._current_flags().fake_quant = bool(enabled)
        self._write_flag(self.fake_quant_enabled, enabled)

    def disable_fake_quant(self) -> None:
        """Switch simulation off."""
        self.enable_fake_quant(False)

    def enable_observer(self, enabled: bool = True) -> None:
        """Switch observation on or off. Off, the parameters stay as they are."""
        self._current_flags().observe = bool(enabled)
        self._write_flag(self.observer_enabled, enabled)

    def disable_observer(self) -> None:
        """Switch observation off."""
        self.enable_observer(False)

    def _current_flags(self) -> Flags:
        if not torch.compiler.is_compiling():
            self._flags.update(self._buffers)
        return self._flags

    def _write_flag(self, buffer: Tensor, value: bool) -> None:
        buffer.fill_(value)
        if not torch.compiler.is_compiling():
            self._flags.adopt(self._buffers)

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
