"""Simulators of pruning: parametrizations that multiply a parameter by a mask."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coreai_kernels.ops import apply_mask as apply_mask_op
from coreai_opt._utils.spec_utils import PartialConstructor, with_args
from coreai_opt.config.spec.compression_simulator import CompressionSimulatorBase
from coreai_opt.pruning.spec.scheme import PruningScheme

if TYPE_CHECKING:
    from coreai_opt.pruning.config.sparsity_schedule import SparsityScheduleBase

__all__ = ["PruneImplBase"]

# Key in the metadata that torch keeps beside a state_dict: tensors there are only those of the API.
_METADATA = "pruning"


class PruneImplBase(CompressionSimulatorBase):
    """Base of the simulators of pruning. A subclass defines :meth:`compute_mask`.

    The mask is computed at the first forward, and again where the sparsity has changed since; in between it
    stays, whatever the weight does.

    The buffer ``mask``, of the weight's shape and dtype, is 1 for what stays and 0 for what is pruned; before
    the first forward it has shape (0,). Step and sparsity are kept in the metadata of the ``state_dict``,
    which ``torch.save`` writes too.

    Args:
        target_sparsity: fraction to prune, in [0, 1]; with a schedule, at its end.
        pruning_scheme: which elements are pruned together.
        **kwargs: for subclasses; not used here.

    Raises:
        ValueError: ``target_sparsity`` is outside [0, 1].
    """

    mask: Tensor
    schedule: SparsityScheduleBase | None = None

    def __init__(self, target_sparsity: float, pruning_scheme: PruningScheme, **kwargs: Any) -> None:
        super().__init__()
        self._target_sparsity = _checked_sparsity(target_sparsity, "target_sparsity")
        self._sparsity = self._target_sparsity
        self._pruning_scheme = pruning_scheme
        self.schedule = None
        self._step_count = 0
        self._stale = True
        self.register_buffer("mask", torch.empty(0))

    @classmethod
    def with_args(cls, **kwargs: Any) -> PartialConstructor[PruneImplBase]:
        """A constructor with arguments bound."""
        return with_args(cls, **kwargs)

    @staticmethod
    @abstractmethod
    def compute_mask(weight: Tensor, sparsity: float, pruning_scheme: PruningScheme) -> Tensor:
        """The mask for a weight.

        Args:
            weight: floating-point tensor of any shape.
            sparsity: fraction to prune, in [0, 1].
            pruning_scheme: which elements are pruned together.

        Returns:
            Tensor of the weight's shape: 1 for what stays, 0 for what is pruned. It may be an expanded view;
            the buffer ``mask`` gets memory of its own then.
        """

    @property
    def sparsity(self) -> float:
        """Fraction that the mask prunes, at the next forward if it has just changed."""
        return self._sparsity

    @property
    def target_sparsity(self) -> float:
        """The sparsity without a schedule, or at its end."""
        return self._target_sparsity

    @property
    def pruning_scheme(self) -> PruningScheme:
        """Which elements are pruned together."""
        return self._pruning_scheme

    @property
    def is_stale(self) -> bool:
        """Whether the next forward computes the mask."""
        return self._stale

    @property
    def step_count(self) -> int:
        """The step of the last :meth:`update_sparsity`, 0 before."""
        return self._step_count

    def update_sparsity(self, step_count: int) -> None:
        """Set the sparsity that the schedule has for a step.

        Raises:
            RuntimeError: there is no schedule.
            ValueError: the schedule gives a sparsity outside [0, 1]; nothing changes.
        """
        if self.schedule is None:
            raise RuntimeError(
                f"Tensor {self.tensor_fqn!r} has no sparsity schedule: set the attribute 'schedule' first"
            )
        sparsity = _checked_sparsity(
            self.schedule.compute_sparsity(step_count, self._target_sparsity, self._sparsity),
            f"the sparsity of {type(self.schedule).__name__} at step {step_count}",
        )
        self._step_count = step_count
        self._stale |= sparsity != self._sparsity
        self._sparsity = sparsity

    def restore_step(self, step_count: int, sparsity: float | None = None) -> None:
        """Set step and sparsity, and take the mask that is there for theirs.

        Args:
            step_count: steps done.
            sparsity: the sparsity then. None to find it by the schedule, from the first step on.

        Raises:
            ValueError: ``sparsity`` is outside [0, 1].
        """
        if sparsity is not None:
            self._sparsity = _checked_sparsity(sparsity, "sparsity")
        elif self.schedule is not None:
            self._sparsity = self._target_sparsity
            for step in range(step_count + 1):
                self.update_sparsity(step)
        self._step_count = step_count
        self._stale = self.mask.numel() == 0

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` with the pruned elements zero; the gradient of those is zero, too.

        Args:
            weight: floating-point tensor, of the same shape at each call.

        Raises:
            RuntimeError: the mask has another shape.
        """
        if self._stale:
            self.set_mask(self.mask_for(weight))
        if self.mask.shape != weight.shape:
            raise RuntimeError(
                f"Tensor {self.tensor_fqn!r}: the mask has shape {tuple(self.mask.shape)}, "
                f"the weight has {tuple(weight.shape)}"
            )
        return apply_mask_op.apply(weight, self.mask)

    def mask_for(self, weight: Tensor) -> Tensor:
        """The mask for ``weight`` at the present sparsity; nothing changes."""
        with torch.no_grad():
            mask = self.compute_mask(weight.detach(), self._sparsity, self._pruning_scheme)
            if mask.shape != weight.shape:
                raise RuntimeError(
                    f"Tensor {self.tensor_fqn!r}: {type(self).__name__}.compute_mask gave a mask of shape "
                    f"{tuple(mask.shape)} for a weight of shape {tuple(weight.shape)}"
                )
            mask = mask.to(weight)
            # The buffer is dense: it is loaded in place, and multiplied at every step.
            return torch.empty_like(weight).copy_(mask) if 0 in mask.stride() else mask

    def set_mask(self, mask: Tensor) -> None:
        """Replace the mask by one that was computed elsewhere, for the present sparsity."""
        if (
            self.mask.shape == mask.shape
            and self.mask.dtype == mask.dtype
            and self.mask.device == mask.device
        ):
            self.mask.copy_(mask)
        else:
            self.mask = mask
        self._stale = False

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"sparsity={self._sparsity:g}, target={self._target_sparsity:g}, {self._pruning_scheme!r}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata[_METADATA] = {
                "step_count": self._step_count,
                "sparsity": self._sparsity,
                "stale": self._stale,
            }

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        mask = state_dict.get(f"{prefix}mask")
        if mask is not None and self.mask.numel() == 0:
            self.mask = torch.empty_like(mask, device=self.mask.device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if mask is None:
            return
        kept = local_metadata.get(_METADATA)
        if kept is None:
            self._stale = mask.numel() == 0
            if self.schedule is not None:
                warnings.warn(
                    f"Tensor {self.tensor_fqn!r}: the state_dict has a mask, but no step of the schedule, "
                    f"which stays at {self._step_count}. MagnitudePruner.load_state_dict sets it.",
                    UserWarning,
                    stacklevel=2,
                )
            return
        self._step_count = kept["step_count"]
        self._sparsity = kept["sparsity"]
        self._stale = kept["stale"]


@PruneImplBase.register("default")
class _MagnitudePruneImpl(PruneImplBase):
    """Prunes the smallest magnitudes."""

    @staticmethod
    def compute_mask(weight: Tensor, sparsity: float, pruning_scheme: PruningScheme) -> Tensor:
        """See the base.

        Raises:
            ValueError: ``sparsity`` is outside [0, 1], or the scheme does not fit the shape.
            TypeError: ``weight`` is not floating point, or ``pruning_scheme`` no scheme.
        """
        if not isinstance(pruning_scheme, PruningScheme):
            raise TypeError(f"pruning_scheme must be a PruningScheme, got {pruning_scheme!r}")
        return pruning_scheme.magnitude_mask(weight, _checked_sparsity(sparsity, "sparsity"))


def _checked_sparsity(sparsity: float, what: str) -> float:
    """``sparsity``; ValueError unless it is in [0, 1]."""
    if not 0 <= sparsity <= 1:
        raise ValueError(f"{what} must be in [0, 1], got {sparsity}")
    return sparsity
