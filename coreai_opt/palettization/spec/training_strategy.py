"""What a palettized weight does while the model trains."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, model_serializer

from coreai_opt._utils.registry_utils import ConfigRegistryMixin

if TYPE_CHECKING:
    from coreai_opt.palettization.spec.fake_palettize import _FakePalettizeImplBase

__all__ = ["DefaultTrainingSpec", "TrainingStrategy", "TrainingStrategySpec"]


class TrainingStrategy(ABC):
    """The forward of a palettized weight in training mode, and what happens between the steps.

    One strategy may serve many weights: what belongs to a weight lives in its simulator.
    """

    # Whether the optimizer moves the weight or its palette, so that stored indices go out of date.
    updates_weight: ClassVar[bool] = True
    # Whether forwards depend on the simulator's `palette_spacing`, which checkpoints then have to hold.
    uses_palette_spacing: ClassVar[bool] = False

    @abstractmethod
    def train_forward(self, module: "_FakePalettizeImplBase", weight: torch.Tensor) -> torch.Tensor:
        """The values that the model computes with, of the weight's shape and dtype.

        Args:
            module: the weight's simulator, with its palette: ``lut``, ``hard_assign``.
            weight: the trained weight.
        """

    def on_palette_computed(self, module: "_FakePalettizeImplBase") -> None:  # noqa: B027 - optional
        """Called whenever clustering has given the simulator a new palette."""

    def on_step(  # noqa: B027 - optional
        self, module: "_FakePalettizeImplBase", weight: torch.Tensor, step: int
    ) -> None:
        """Called by ``KMeansPalettizer.step`` for each simulator that is switched on.

        Args:
            module: the weight's simulator.
            weight: the trained weight.
            step: how many steps have been made, this one included.
        """


class TrainingStrategySpec(BaseModel, ConfigRegistryMixin):
    """Base of the descriptions of training strategies.

    A subclass names its strategy in a private attribute ``_strategy_cls`` and is registered under a key, by
    which a specification can name it: ``{"type": key, ...}``. Fields become arguments of the strategy.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_serializer
    def _serialize_model(self) -> dict[str, Any]:
        data = {name: getattr(self, name) for name in type(self).model_fields}
        for key, registered in TrainingStrategySpec.REGISTRY.items():
            if registered is type(self):
                data["type"] = key
        return data

    def build_strategy(self) -> TrainingStrategy:
        """The strategy described.

        Raises:
            AttributeError: the class names no strategy.
        """
        strategy: type[TrainingStrategy] = self._strategy_cls  # type: ignore[attr-defined]
        return strategy(**{name: getattr(self, name) for name in type(self).model_fields})


class _DefaultTrainingStrategy(TrainingStrategy):
    """The weight stays at its palettized values; everything else trains around it."""

    updates_weight = False

    def train_forward(self, module: "_FakePalettizeImplBase", weight: torch.Tensor) -> torch.Tensor:
        return module.hard_assign(weight)


@TrainingStrategySpec.register("default")
class DefaultTrainingSpec(TrainingStrategySpec):
    """Palettized weights stay fixed: no gradient reaches them."""

    _strategy_cls: ClassVar[type[TrainingStrategy]] = _DefaultTrainingStrategy
