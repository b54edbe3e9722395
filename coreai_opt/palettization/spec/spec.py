"""The specification of a weight's palettization."""

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, PrivateAttr, SerializeAsAny, model_validator

from coreai_opt.common import CompressionType
from coreai_opt.config.spec.base import CompressionSpec
from coreai_opt.palettization.spec.granularity import PalettizationGranularity, PerTensorGranularity
from coreai_opt.palettization.spec.training_strategy import DefaultTrainingSpec, TrainingStrategySpec
from coreai_opt.quantization.spec import (
    PerTensorGranularity as PerTensorQuantization,
)
from coreai_opt.quantization.spec import QuantizationFormulation, QuantizationSpec

__all__ = ["PalettizationSpec", "default_weight_palettization_spec"]


class PalettizationSpec(CompressionSpec):
    """How to palettize one weight: to replace its values by the nearest of ``2 ** n_bits``. Immutable.

    Fields:
        n_bits: bits of an index into the palette.
        lut_qspec: quantization of the palette's own values, one scale for each palette; None to keep them.
        granularity: which elements share a palette; also a dict ``{"type": "per_grouped_channel", ...}``.
        cluster_dim: length of the vectors that an index stands for: consecutive output channels.
        enable_per_channel_scale: divide each output channel by its largest magnitude before clustering.
        training_strategy_spec: what happens to the weight in training; also a dict ``{"type": "default"}``.
        sparsity_detection_threshold: from this share of zeros on, 0 to 1, a weight is taken to be pruned: its
            zeros stay, and palettes are for the other values alone. None for palettes of all values.

    Raises:
        pydantic.ValidationError: a value is not allowed.
        KeyError: the ``type`` of a granularity or of a training strategy is not registered.
    """

    LUT_DTYPES: ClassVar[tuple[torch.dtype, ...]] = (
        torch.int8,
        torch.uint8,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
    _compression_type: CompressionType = PrivateAttr(default=CompressionType.PALETTIZATION)

    n_bits: Literal[1, 2, 3, 4, 6, 8] = 4
    lut_qspec: QuantizationSpec | None = None
    granularity: Annotated[
        SerializeAsAny[PalettizationGranularity],
        BeforeValidator(PalettizationGranularity.maybe_build_from_dict),
    ] = Field(default_factory=PerTensorGranularity)
    cluster_dim: Annotated[int, Field(gt=0)] = 1
    enable_per_channel_scale: bool = False
    training_strategy_spec: Annotated[
        SerializeAsAny[TrainingStrategySpec],
        BeforeValidator(TrainingStrategySpec.maybe_build_from_dict),
    ] = Field(default_factory=DefaultTrainingSpec)
    sparsity_detection_threshold: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def validate_lut_qspec(self) -> "PalettizationSpec":
        """ValueError unless palettes can be quantized as ``lut_qspec`` says."""
        spec = self.lut_qspec
        if spec is None:
            return self
        if spec.dtype not in self.LUT_DTYPES:
            allowed = ", ".join(map(str, self.LUT_DTYPES))
            raise ValueError(f"lut_qspec.dtype must be one of {allowed}; got {spec.dtype}")
        if not spec.dtype.is_floating_point and spec.scale_dtype is not None:
            raise ValueError(
                f"lut_qspec.scale_dtype must be None for the integer dtype {spec.dtype}; "
                f"got {spec.scale_dtype}"
            )
        if not isinstance(spec.granularity, PerTensorQuantization):
            raise ValueError(
                f"lut_qspec.granularity must be PerTensorGranularity, one scale for each palette; "
                f"got {type(spec.granularity).__name__}"
            )
        if spec.qformulation != QuantizationFormulation.ZP:
            raise ValueError(
                f"lut_qspec.qformulation must be QuantizationFormulation.ZP; got {spec.qformulation}"
            )
        return self

    def model_dump_preserve_objects(self) -> dict[str, Any]:
        """The fields by name, with nested specifications as the objects that they are."""
        return {name: getattr(self, name) for name in type(self).model_fields}


def default_weight_palettization_spec() -> PalettizationSpec:
    """4 bits, one palette for each weight."""
    return PalettizationSpec()
