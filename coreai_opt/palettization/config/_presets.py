"""Configurations that have proved themselves."""

from typing import TYPE_CHECKING, Literal

from coreai_opt.palettization.spec import (
    PalettizationGranularity,
    PalettizationSpec,
    PerGroupedChannelGranularity,
    PerTensorGranularity,
)

if TYPE_CHECKING:
    from coreai_opt.palettization.config.palettization_config import (
        KMeansPalettizerConfig,
        ModuleKMeansPalettizerConfig,
    )

__all__ = ["KMeansPalettizerPresets", "ModuleKMeansPalettizerPresets"]


class ModuleKMeansPalettizerPresets:
    """Module configurations by number of bits."""

    def w4(self, *, axis: int = 0, group_size: int = 16) -> "ModuleKMeansPalettizerConfig":
        """4 bits, a palette for each ``group_size`` channels along ``axis``."""
        return _module_config(4, PerGroupedChannelGranularity(axis=axis, group_size=group_size))

    def w6(self, *, axis: int = 0, group_size: int = 16) -> "ModuleKMeansPalettizerConfig":
        """6 bits, a palette for each ``group_size`` channels along ``axis``."""
        return _module_config(6, PerGroupedChannelGranularity(axis=axis, group_size=group_size))

    def w8(self) -> "ModuleKMeansPalettizerConfig":
        """8 bits, a palette for each weight."""
        return _module_config(8, PerTensorGranularity())


class KMeansPalettizerPresets:
    """Configurations of a whole model by number of bits."""

    def w4(self, *, axis: int = 0, group_size: int = 16) -> "KMeansPalettizerConfig":
        """4 bits, a palette for each ``group_size`` channels along ``axis``."""
        return _config(ModuleKMeansPalettizerPresets().w4(axis=axis, group_size=group_size))

    def w6(self, *, axis: int = 0, group_size: int = 16) -> "KMeansPalettizerConfig":
        """6 bits, a palette for each ``group_size`` channels along ``axis``."""
        return _config(ModuleKMeansPalettizerPresets().w6(axis=axis, group_size=group_size))

    def w8(self) -> "KMeansPalettizerConfig":
        """8 bits, a palette for each weight."""
        return _config(ModuleKMeansPalettizerPresets().w8())


def _module_config(
    n_bits: Literal[4, 6, 8], granularity: PalettizationGranularity
) -> "ModuleKMeansPalettizerConfig":
    from coreai_opt.palettization.config.palettization_config import ModuleKMeansPalettizerConfig

    spec = PalettizationSpec(n_bits=n_bits, granularity=granularity)
    return ModuleKMeansPalettizerConfig(
        op_input_spec=None,
        op_output_spec=None,
        op_state_spec={"weight": spec, "in_proj_weight": spec},
    )


def _config(module_config: "ModuleKMeansPalettizerConfig") -> "KMeansPalettizerConfig":
    from coreai_opt.palettization.config.palettization_config import KMeansPalettizerConfig

    return KMeansPalettizerConfig(global_config=module_config)
