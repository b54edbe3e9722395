"""Which elements of a weight share a palette."""

from abc import abstractmethod
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_serializer

from coreai_opt._utils.registry_utils import ConfigRegistryMixin
from coreai_opt.palettization.spec.errors import _IncompatibleGranularityError

__all__ = ["PalettizationGranularity", "PerGroupedChannelGranularity", "PerTensorGranularity"]


class PalettizationGranularity(BaseModel, ConfigRegistryMixin):
    """Base of the granularities. A granularity cuts a weight into equal blocks, each with its own palette.

    Registered under a key, a subclass can be named in a specification as ``{"type": key, ...}``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    axis: int | None = None

    @model_serializer
    def _serialize_model(self) -> dict[str, Any]:
        data = {name: getattr(self, name) for name in type(self).model_fields}
        for key, registered in PalettizationGranularity.REGISTRY.items():
            if registered is type(self):
                data["type"] = key
        return data

    @abstractmethod
    def num_blocks_to_cluster(self, weight: torch.Tensor) -> int:
        """How many palettes the weight gets.

        Raises:
            _IncompatibleGranularityError: the granularity does not fit the weight's shape.
        """

    @abstractmethod
    def get_blocks_to_cluster(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """The blocks, as views of the weight, in the order of the palettes.

        Raises:
            _IncompatibleGranularityError: the granularity does not fit the weight's shape.
        """


@PalettizationGranularity.register("per_tensor")
class PerTensorGranularity(PalettizationGranularity):
    """One palette for the whole weight."""

    axis: Literal[None] = None

    def num_blocks_to_cluster(self, weight: torch.Tensor) -> int:
        """One."""
        return 1

    def get_blocks_to_cluster(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """The weight itself."""
        return [weight]


@PalettizationGranularity.register("per_grouped_channel")
class PerGroupedChannelGranularity(PalettizationGranularity):
    """One palette for each ``group_size`` consecutive channels along ``axis``.

    ``axis`` is 0 or 1; None leaves it to the operation that uses the weight: the axis of its output channels.
    """

    axis: Annotated[int, Field(ge=0, le=1)] | None = None
    group_size: Annotated[int, Field(gt=0)]

    def num_blocks_to_cluster(self, weight: torch.Tensor) -> int:
        """How many groups the channels make. See the base class."""
        axis = self._checked_axis(weight)
        return weight.shape[axis] // self.group_size

    def get_blocks_to_cluster(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """The groups, as views. See the base class."""
        axis = self._checked_axis(weight)
        return list(weight.split(self.group_size, dim=axis))

    def _checked_axis(self, weight: torch.Tensor) -> int:
        axis, shape = self.axis, tuple(weight.shape)
        if axis is None:
            raise _IncompatibleGranularityError(
                "PerGroupedChannelGranularity has axis=None, which leaves the axis to the operation that "
                "uses the weight; here none is known: give axis=0 or axis=1"
            )
        if weight.dim() < 2:
            raise _IncompatibleGranularityError(
                f"groups of channels need a weight of 2 dimensions or more; got shape {shape}"
            )
        if shape[axis] % self.group_size:
            raise _IncompatibleGranularityError(
                f"size {shape[axis]} of axis {axis} is not divisible by group_size {self.group_size} "
                f"(shape {shape})"
            )
        return axis
