"""Ready configurations of models."""

from typing import TYPE_CHECKING

from coreai_opt.quantization.config._presets.module_quantizer_config import ModuleQuantizerPresets

if TYPE_CHECKING:
    from coreai_opt.quantization.config.quantization_config import (
        ExecutionMode,
        ModuleQuantizerConfig,
        QuantizerConfig,
    )

__all__ = ["QuantizerPresets"]

_MODULE_PRESETS = ModuleQuantizerPresets()


class QuantizerPresets:
    """The presets of modules, for a whole model."""

    def w4(
        self, *, axis: int | None = None, execution_mode: "ExecutionMode | str" = "graph"
    ) -> "QuantizerConfig":
        """4-bit weights, a scale for each channel along ``axis``."""
        return _for_model(_MODULE_PRESETS.w4(axis=axis), execution_mode)

    def w8(
        self, *, axis: int | None = None, execution_mode: "ExecutionMode | str" = "graph"
    ) -> "QuantizerConfig":
        """8-bit weights, a scale for each channel along ``axis``."""
        return _for_model(_MODULE_PRESETS.w8(axis=axis), execution_mode)

    def w4_per_block(
        self,
        *,
        block_size: int = 32,
        axis: int | None = None,
        execution_mode: "ExecutionMode | str" = "graph",
    ) -> "QuantizerConfig":
        """4-bit weights, a scale for each block of ``block_size`` elements along ``axis``."""
        return _for_model(_MODULE_PRESETS.w4_per_block(block_size=block_size, axis=axis), execution_mode)


def _for_model(config: "ModuleQuantizerConfig", execution_mode: "ExecutionMode | str") -> "QuantizerConfig":
    from coreai_opt.quantization.config.quantization_config import QuantizerConfig

    return QuantizerConfig(global_config=config, execution_mode=execution_mode)  # type: ignore[arg-type]
