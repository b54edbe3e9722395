"""Configuration of palettization."""

from coreai_opt.palettization.config.palettization_config import (
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    OpKMeansPalettizerConfig,
    PATSchedule,
    VectorKMeansConfig,
)

__all__ = [
    "KMeansPalettizerConfig",
    "ModuleKMeansPalettizerConfig",
    "OpKMeansPalettizerConfig",
    "PATSchedule",
    "VectorKMeansConfig",
]
