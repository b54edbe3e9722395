"""Ready configurations of models."""

from typing import Any, TypeVar

from coreai_opt._utils.presets import PresetsOf

__all__ = ["QuantizerPresets"]

_C = TypeVar("_C")


class QuantizerPresets(PresetsOf[_C]):
    """The presets of modules, for a whole model."""

    def w4(self, *, axis: int | None = None, execution_mode: str = "graph") -> _C:
        """4-bit weights, a scale for each channel along ``axis``."""
        return self._for_model(self._of_modules.w4(axis=axis), execution_mode)

    def w8(self, *, axis: int | None = None, execution_mode: str = "graph") -> _C:
        """8-bit weights, a scale for each channel along ``axis``."""
        return self._for_model(self._of_modules.w8(axis=axis), execution_mode)

    def w4_per_block(
        self, *, block_size: int = 32, axis: int | None = None, execution_mode: str = "graph"
    ) -> _C:
        """4-bit weights, a scale for each block of ``block_size`` elements along ``axis``."""
        module_config = self._of_modules.w4_per_block(block_size=block_size, axis=axis)
        return self._for_model(module_config, execution_mode)

    @property
    def _of_modules(self) -> Any:
        owner: Any = self._class
        return owner._get_module_config_class().presets

    def _for_model(self, config: Any, execution_mode: str) -> _C:
        return self._class(global_config=config, execution_mode=execution_mode)
