"""Simulators of pruning: parametrizations that multiply a parameter by a mask."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coreai_kernels.ops import apply_mask as apply_mask_op
from coreai_opt._sharding.layout import is_sharded, part_of, with_local
from coreai_opt._sharding.masks import whole_mask
from coreai_opt._utils.spec_utils import PartialConstructor, with_args
from coreai_opt.config.spec.compression_simulator import CompressionSimulatorBase, Storage
from coreai_opt.pruning.spec.scheme import PruningScheme

if TYPE_CHECKING:
    from coreai_opt.pruning.config.sparsity_schedule import SparsityScheduleBase

__all__ = ["PruneImplBase"]

# Key in a state_dict's metadata under which earlier versions of this package kept the step.
_OLD_METADATA = "pruning"


class PruneImplBase(CompressionSimulatorBase):
    """Base of the simulators of pruning. A subclass defines :meth:`compute_mask`.

    The mask is computed at the first forward, and again where the sparsity has changed since; in between it
    stays, whatever the weight does. A mask that is loaded counts as computed, and the sparsity is the one
    that the schedule has for the loaded step.

    The buffer ``mask``, of the weight's shape, is 1 for what stays and 0 for what is pruned; before the first
    forward it has shape (0,). It follows the weight's device and dtype. The buffer ``step_count``, int64 of
    shape (), counts the steps of :meth:`.MagnitudePruner.step`.

    Args:
        target_sparsity: fraction to prune, in [0, 1]; with a schedule, at its end.
        pruning_scheme: which elements are pruned together.
        **kwargs: for subclasses; not used here.

    Raises:
        ValueError: ``target_sparsity`` is outside [0, 1].
    """

    mask: Tensor
    step_count: Tensor
    schedule: SparsityScheduleBase | None = None

    def __init__(self, target_sparsity: float, pruning_scheme: PruningScheme, **kwargs: Any) -> None:
        super().__init__()
        self._target_sparsity = _checked_sparsity(target_sparsity, "target_sparsity")
        self._sparsity = self._target_sparsity
        self._pruning_scheme = pruning_scheme
        self.schedule = None
        self._stale = True
        self.register_buffer("mask", torch.empty(0))
        self.register_buffer("step_count", torch.zeros((), dtype=torch.int64))
        # What the host knows of step_count: the tensor, its version, and its value.
        self._known_steps: tuple[Tensor, int, int]
        self._know_steps(0)
        # Whether the last state that was loaded had no step_count.
        self.lacked_step_count = False

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
            Tensor of the weight's shape: 1 for what stays, 0 for what is pruned. The buffer ``mask`` has
            memory of its own.
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

    def steps(self) -> int:
        """The value of ``step_count``. The host waits for it only where others have written it."""
        count, known = self.step_count, self._known_steps
        if count is not known[0] or _version_of(count) != known[1]:
            self._know_steps(int(count))
        return self._known_steps[2]

    def set_steps(self, steps: int) -> None:
        """Set ``step_count`` and the sparsity of that step, and take the mask that is there for its own.

        Raises:
            ValueError: the schedule gives a sparsity outside [0, 1]; nothing changes.
        """
        self._sparsity = self._sparsity_at(steps, None)
        with torch.no_grad():
            self.step_count.fill_(steps)
        self._know_steps(steps)
        self._stale = self.mask.numel() == 0

    def count_step(self) -> None:
        """Note that ``step_count`` has been raised by one."""
        self._know_steps(self._known_steps[2] + 1)

    def update_sparsity(self, step_count: int) -> None:
        """Set the sparsity that the schedule has for a step. The buffer ``step_count`` stays.

        Raises:
            RuntimeError: there is no schedule.
            ValueError: the schedule gives a sparsity outside [0, 1]; nothing changes.
        """
        if self.schedule is None:
            raise RuntimeError(
                f"Tensor {self.tensor_fqn!r} has no sparsity schedule: set the attribute 'schedule' first"
            )
        self.set_sparsity(self._sparsity_at(step_count, self._sparsity))

    def sparsity_after(self, steps: int) -> float:
        """The sparsity that the schedule has for a step that follows the present one; nothing changes.

        Raises:
            ValueError: it is outside [0, 1].
        """
        return self._sparsity_at(steps, self._sparsity)

    def set_sparsity(self, sparsity: float) -> None:
        """Set the fraction that the mask prunes; if it is another one, the mask is computed anew."""
        self._stale |= sparsity != self._sparsity
        self._sparsity = sparsity

    def _sparsity_at(self, steps: int, previous: float | None) -> float:
        if self.schedule is None:
            return self._target_sparsity
        return _checked_sparsity(
            self.schedule._sparsity_after(steps, self._target_sparsity, previous),
            f"the sparsity of {type(self.schedule).__name__} at step {steps}",
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What ``to`` and the like call: the buffers move, and the host keeps what it knows."""
        count, version, steps = self._known_steps
        is_known = self.step_count is count and _version_of(count) == version
        result = super()._apply(fn, recurse)
        if is_known:
            self._know_steps(steps)
        return result

    def _know_steps(self, steps: int) -> None:
        self._known_steps = (self.step_count, _version_of(self.step_count), steps)

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` with the pruned elements zero; the gradient of those is zero, too.

        Args:
            weight: floating-point tensor, of the same shape at each call.

        Raises:
            RuntimeError: the mask has another shape.
        """
        if self._stale:
            self.set_mask(self.mask_for(weight))
        elif self.mask.dtype != weight.dtype or self.mask.device != weight.device:
            self.mask = self.mask.to(device=weight.device, dtype=weight.dtype)
        if self.mask.shape != weight.shape:
            raise RuntimeError(
                f"Tensor {self.tensor_fqn!r}: the mask has shape {tuple(self.mask.shape)}, "
                f"the weight has {tuple(weight.shape)}"
            )
        if is_sharded(weight):
            local: Tensor = weight.to_local()  # type: ignore[attr-defined]
            part = part_of(weight)
            return with_local(weight, apply_mask_op.apply(local.view_as(part.local), part.cut(self.mask)))
        return apply_mask_op.apply(weight, self.mask)

    def mask_for(self, weight: Tensor) -> Tensor:
        """The mask for ``weight`` at the present sparsity, whole if that is sharded; nothing changes."""
        with torch.no_grad():
            mask = self.compute_mask(weight.detach(), self._sparsity, self._pruning_scheme)
            if mask.shape != weight.shape:
                raise RuntimeError(
                    f"Tensor {self.tensor_fqn!r}: {type(self).__name__}.compute_mask gave a mask of shape "
                    f"{tuple(mask.shape)} for a weight of shape {tuple(weight.shape)}"
                )
            mask = whole_mask(mask)
            if is_sharded(weight):
                return mask.to(weight.dtype).contiguous()
            mask = mask.to(weight)
            # The buffer is dense: it is loaded in place, and multiplied at every step.
            return torch.empty_like(weight).copy_(mask) if 0 in mask.stride() else mask

    def storage(self, original: Tensor) -> Storage:
        """What is stored of ``original``. See the base class."""
        mask = self.mask if self.mask.numel() else self.mask_for(original)
        return Storage(None, 0, int(torch.count_nonzero(mask)))

    def set_mask(self, mask: Tensor) -> None:
        """Replace the mask by one that was computed elsewhere, for the present sparsity."""
        if (
            self.mask.shape == mask.shape
            and self.mask.dtype == mask.dtype
            and self.mask.device == mask.device
        ):
            self.mask.copy_(mask)
        else:
            # Memory of its own: a subclass may keep what it has computed, or give several weights the same.
            self.mask = mask.clone()
        self._stale = False

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"sparsity={self._sparsity:g}, target={self._target_sparsity:g}, {self._pruning_scheme!r}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        mask = state_dict.get(f"{prefix}mask")
        if mask is not None and self.mask.numel() == 0:
            self.mask = torch.empty_like(mask, device=self.mask.device)
        if mask is not None:
            self.lacked_step_count = f"{prefix}step_count" not in state_dict
        if mask is not None and self.lacked_step_count:
            # Saved by 0.3.0, which kept no step, or by this package when it kept the step in the metadata.
            steps = local_metadata.get(_OLD_METADATA, {}).get("step_count", self.steps())
            state_dict[f"{prefix}step_count"] = torch.tensor(steps)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if mask is not None:
            self._know_steps(int(self.step_count))
            self._sparsity = self._sparsity_at(self.steps(), None)
            self._stale = self.mask.numel() == 0


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


def _version_of(tensor: Tensor) -> int:
    # Tensors of inference mode count no versions; nobody may write to them outside of it.
    return -1 if tensor.is_inference() else tensor._version


def _checked_sparsity(sparsity: float, what: str) -> float:
    """``sparsity``; ValueError unless it is in [0, 1]."""
    if not 0 <= sparsity <= 1:
        raise ValueError(f"{what} must be in [0, 1], got {sparsity}")
    return sparsity
