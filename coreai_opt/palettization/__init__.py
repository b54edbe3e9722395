"""Palettization: weights that take their values from small palettes."""

from coreai_opt.palettization.config import KMeansPalettizerConfig, ModuleKMeansPalettizerConfig
from coreai_opt.palettization.kmeans import KMeansPalettizer
from coreai_opt.palettization.spec import PalettizationSpec

__all__ = [
    "KMeansPalettizer",
    "KMeansPalettizerConfig",
    "ModuleKMeansPalettizerConfig",
    "PalettizationSpec",
]
