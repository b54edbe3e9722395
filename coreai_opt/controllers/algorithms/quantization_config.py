"""Configuration of quantization."""

from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from coreai_opt.controllers.core.config import AlgorithmConfig, ConfigModel
from coreai_opt.quantization.spec import (
    PerChannelGranularity,
    PerTensorGranularity,
    QuantizationScheme,
    QuantizationSpec,
)

__all__ = ["QuantizationConfig", "RangeInitializer", "TensorConfig"]

RangeType = Literal["mixed_min_max", "min_max", "mean_min_max", "threesigma", "percentile", "mean_percentile"]


class PercentileParams(ConfigModel):
    """Percentiles that become the ends of a range."""

    min_percentile: float = Field(default=0.1, ge=0, le=100)
    max_percentile: float = Field(default=99.9, ge=0, le=100)


class RangeInitializer(ConfigModel):
    """How ranges are found. See :mod:`.ranges` for the types."""

    num_init_samples: int = Field(default=256, ge=0)
    type: RangeType = "mixed_min_max"
    params: PercentileParams = Field(default_factory=PercentileParams)


class BatchnormAdaptation(ConfigModel):
    """On how many samples batch-norm statistics are found anew; 0 for not at all."""

    num_bn_adaptation_samples: int = Field(default=2000, ge=0)


class Initializer(ConfigModel):
    """What is initialised from data."""

    range: RangeInitializer = Field(default_factory=RangeInitializer)
    batchnorm_adaptation: BatchnormAdaptation = Field(default_factory=BatchnormAdaptation)


class TensorConfig(ConfigModel):
    """How weights, or activations, are quantized; None leaves it to the preset.

    Fields:
        bits: 2, 4 or 8.
        mode: ``symmetric`` or ``asymmetric``.
        per_channel: a range for each output channel; for weights alone.
        signed: for symmetric activations, whether the integers are signed; None: as the data are.
    """

    bits: Literal[2, 4, 8] = 8
    mode: Literal["symmetric", "asymmetric"] | None = None
    per_channel: bool | None = None
    signed: bool | None = None

    def spec(self, signed: bool, channel_axis: int | None = None) -> QuantizationSpec:
        """The specification of a tensor's simulator.

        Args:
            signed: whether the integers are signed.
            channel_axis: axis of the channels that have ranges of their own.
        """
        # Symmetric and unsigned is a range from zero on, which the asymmetric scheme has without an offset.
        symmetric = self.mode == "symmetric" and signed
        return QuantizationSpec(
            dtype=getattr(torch, f"{'int' if signed else 'uint'}{self.bits}"),
            qscheme=QuantizationScheme.SYMMETRIC if symmetric else QuantizationScheme.ASYMMETRIC,
            granularity=(
                PerTensorGranularity() if channel_axis is None else PerChannelGranularity(axis=channel_axis)
            ),
        )


class StagedParams(ConfigModel):
    """The epochs from which activations and weights are quantized."""

    activations_quant_start_epoch: int = Field(default=0, ge=0)
    weights_quant_start_epoch: int = Field(default=0, ge=0)


class QuantizationConfig(AlgorithmConfig):
    """Configuration of quantization.

    Fields:
        preset: ``performance``, all symmetric; ``mixed``, symmetric weights and asymmetric activations.
        weights, activations: what differs from the preset.
        quantize_inputs: whether layers that take the model's input quantize it.
        learnable_ranges: train the ranges with the weights.
        initializer: ranges and batch norm from data.
        params: staged start.
    """

    algorithm: Literal["quantization"]
    preset: Literal["performance", "mixed"] = "performance"
    weights: TensorConfig = Field(default_factory=TensorConfig)
    activations: TensorConfig = Field(default_factory=TensorConfig)
    quantize_inputs: bool = True
    learnable_ranges: bool = False
    initializer: Initializer = Field(default_factory=Initializer)
    params: StagedParams = Field(default_factory=StagedParams)

    @field_validator("activations")
    @classmethod
    def _per_tensor(cls, activations: TensorConfig) -> TensorConfig:
        if activations.per_channel:
            raise ValueError("activations are quantized per tensor; per_channel is for weights")
        return activations

    def model_post_init(self, context: Any) -> None:
        """Fill in what the preset says."""
        self.weights = self.weights.model_copy(
            update={
                "mode": self.weights.mode or "symmetric",
                "per_channel": True if self.weights.per_channel is None else self.weights.per_channel,
            }
        )
        mode = "asymmetric" if self.preset == "mixed" else "symmetric"
        self.activations = self.activations.model_copy(update={"mode": self.activations.mode or mode})
