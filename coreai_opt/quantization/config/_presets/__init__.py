"""Ready configurations, as the attribute ``presets`` of the configuration classes."""

from coreai_opt.quantization.config._presets.module_quantizer_config import ModuleQuantizerPresets
from coreai_opt.quantization.config._presets.quantizer_config import QuantizerPresets

__all__ = ["ModuleQuantizerPresets", "QuantizerPresets"]
