"""Configurations that have proved themselves."""

from typing import Any, Literal, TypeVar

from coreai_opt._utils.presets import PresetsOf
from coreai_opt.palettization.spec import (
    PalettizationGranularity,
    PalettizationSpec,
    PerGroupedChannelGranularity,
    PerTensorGranularity,
)

__all__ = ["KMeansPalettizerPresets", "ModuleKMeansPalettizerPresets"]

_C = TypeVar("_C")


class ModuleKMeansPalettizerPresets(PresetsOf[_C]):
    """Module configurations by number of bits."""

    def w4(self, *, axis: int = 0, group_size: int = 16) -> _C:
        """4 bits, a palette for each ``group_size`` channels along ``axis``."""
        return self._of(4, PerGroupedChannelGranularity(axis=axis, group_size=group_size))

    def w6(self, *, axis: int = 0, group_size: int = 16) -> _C:
        """6 bits, a palette for each ``group_size`` channels along ``axis``."""
        return self._of(6, PerGroupedChannelGranularity(axis=axis, group_size=group_size))

    def w8(self) -> _C:
        """8 bits, a palette for each weight."""
        return self._of(8, PerTensorGranularity())

    def _of(self, n_bits: Literal[4, 6, 8], granularity: PalettizationGranularity) -> _C:
        spec = PalettizationSpec(n_bits=n_bits, granularity=granularity)
        return self._class(
            op_input_spec=None,
            op_output_spec=None,
            op_state_spec={"weight": spec, "in_proj_weight": spec},
        )


class KMeansPalettizerPresets(PresetsOf[_C]):
    """Configurations of a whole model by number of bits."""

    def w4(self, *, axis: int = 0, group_size: int = 16) -> _C:
        """4 bits, a palette for each ``group_size`` channels along ``axis``."""
        return self._class(global_config=self._of_modules.w4(axis=axis, group_size=group_size))

    def w6(self, *, axis: int = 0, group_size: int = 16) -> _C:
        """6 bits, a palette for each ``group_size`` channels along ``axis``."""
        return self._class(global_config=self._of_modules.w6(axis=axis, group_size=group_size))

    def w8(self) -> _C:
        """8 bits, a palette for each weight."""
        return self._class(global_config=self._of_modules.w8())

    @property
    def _of_modules(self) -> Any:
        owner: Any = self._class
        return owner._get_module_config_class().presets
