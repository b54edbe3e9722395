"""Specifications of palettization, and the strategies and simulators that they name."""

from coreai_opt.palettization.spec.dkm import DKMTrainingSpec
from coreai_opt.palettization.spec.granularity import (
    PalettizationGranularity,
    PerGroupedChannelGranularity,
    PerTensorGranularity,
)
from coreai_opt.palettization.spec.spec import PalettizationSpec, default_weight_palettization_spec
from coreai_opt.palettization.spec.straight_through import StraightThroughTrainingSpec
from coreai_opt.palettization.spec.training_strategy import (
    DefaultTrainingSpec,
    TrainingStrategy,
    TrainingStrategySpec,
)

__all__ = [
    "DKMTrainingSpec",
    "DefaultTrainingSpec",
    "PalettizationGranularity",
    "PalettizationSpec",
    "PerGroupedChannelGranularity",
    "PerTensorGranularity",
    "StraightThroughTrainingSpec",
    "TrainingStrategy",
    "TrainingStrategySpec",
    "default_weight_palettization_spec",
]
