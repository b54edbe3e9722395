"""Ready configurations of modules."""

from typing import TypeVar

from coreai_opt._utils.presets import PresetsOf
from coreai_opt.quantization.spec import (
    PerBlockGranularity,
    PerChannelGranularity,
    QuantizationGranularity,
    QuantizationSpec,
)

__all__ = ["ModuleQuantizerPresets"]

_C = TypeVar("_C")


class ModuleQuantizerPresets(PresetsOf[_C]):
    """Configurations that quantize weights only.

    An axis that is None is the one that suits the module: see the methods of
    :class:`~coreai_opt.quantization.Quantizer`.
    """

    def w4(self, *, axis: int | None = None) -> _C:
        """4-bit integers, a scale for each channel along ``axis``."""
        return self._weights_only("int4", PerChannelGranularity(axis=axis))

    def w8(self, *, axis: int | None = None) -> _C:
        """8-bit integers, a scale for each channel along ``axis``."""
        return self._weights_only("int8", PerChannelGranularity(axis=axis))

    def w4_per_block(self, *, block_size: int = 32, axis: int | None = None) -> _C:
        """4-bit integers, a scale for each block of ``block_size`` elements along ``axis``."""
        return self._weights_only("int4", PerBlockGranularity(axis=axis, block_size=block_size))

    def _weights_only(self, dtype: str, granularity: QuantizationGranularity) -> _C:
        return self._class(
            op_input_spec=None,
            op_output_spec=None,
            op_state_spec={"weight": QuantizationSpec(dtype=dtype, granularity=granularity)},  # type: ignore[arg-type]
        )
