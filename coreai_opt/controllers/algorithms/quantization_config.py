"""Configuration of quantization."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, field_validator, model_validator

from coreai_opt.controllers.core.config import AlgorithmConfig, BatchnormAdaptation, ConfigModel
from coreai_opt.quantization.config import QATSchedule
from coreai_opt.quantization.spec import (
    PerChannelGranularity,
    PerTensorGranularity,
    QuantizationScheme,
    QuantizationSpec,
)

__all__ = [
    "Initializer",
    "PrecisionInitializer",
    "QuantizationConfig",
    "RangeInitializer",
    "StagedParams",
    "TensorConfig",
    "TensorGroupConfig",
]

RangeType = Literal["mixed_min_max", "min_max", "mean_min_max", "threesigma", "percentile", "mean_percentile"]
Group = Literal["weights", "activations"]


def _listed(scopes: Any) -> Any:
    return [scopes] if isinstance(scopes, str) else scopes


ScopeList = Annotated[list[str], BeforeValidator(_listed)]


class PercentileParams(ConfigModel):
    """Percentiles that become the ends of a range."""

    min_percentile: float = Field(default=0.1, ge=0, le=100)
    max_percentile: float = Field(default=99.9, ge=0, le=100)


class RangeInitializer(ConfigModel):
    """How ranges are found. See :mod:`.ranges` for the types.

    Fields:
        target_scopes, ignored_scopes: the layers, in a list of initialisers; None for all.
        target_quantizer_group: ``weights`` or ``activations``; None for both.
    """

    num_init_samples: int = Field(default=256, ge=0)
    type: RangeType = "mixed_min_max"
    params: PercentileParams = Field(default_factory=PercentileParams)
    target_scopes: ScopeList | None = None
    ignored_scopes: ScopeList = Field(default_factory=list)
    target_quantizer_group: Group | None = None


class PrecisionInitializer(ConfigModel):
    """Bits of each layer.

    Fields:
        type: ``manual``, as ``bitwidth_per_scope`` says; ``hawq``, by the traces of the Hessian; ``autoq``,
            greedily by what the outputs lose when one layer has the bits (NNCF has an agent that learns).
        bitwidth_per_scope: pairs of bits and a scope.
        bits: for ``hawq`` and ``autoq``: the widths to choose from.
        compression_ratio: bit operations with 8 bits ÷ those with the chosen ones, at least.
        bitwidth_assignment_mode, dump_init_precision_data, eval_subset_ratio, warmup_iter_number: as in NNCF;
            there is one way to assign bits here, that of a layer's weight to its input, too.
        num_data_points: samples of the Hessian, or of the outputs.
        iter_number, tolerance: for ``hawq``: random vectors at most, and the relative change of the traces
            that ends the estimate.
    """

    type: Literal["manual", "hawq", "autoq"]
    bitwidth_per_scope: list[tuple[int, str]] = Field(default_factory=list)
    bits: list[int] = Field(default_factory=lambda: [4, 8], min_length=1)
    compression_ratio: float = Field(default=1.5, ge=1)
    num_data_points: int = Field(default=100, ge=1)
    iter_number: int = Field(default=200, ge=1)
    tolerance: float = Field(default=1e-4, gt=0)
    bitwidth_assignment_mode: Literal["strict", "liberal"] = "liberal"
    dump_init_precision_data: bool = False
    eval_subset_ratio: float = 1.0
    warmup_iter_number: int = 20

    @model_validator(mode="after")
    def _fits_its_type(self) -> "PrecisionInitializer":
        if self.type == "manual" and not self.bitwidth_per_scope:
            raise ValueError("precision of type 'manual' needs bitwidth_per_scope, pairs of bits and a scope")
        for bits in (*self.bits, *(bits for bits, _ in self.bitwidth_per_scope)):
            if not 2 <= bits <= 8:
                raise ValueError(f"bits must be from 2 to 8; got {bits}")
        return self


class Initializer(ConfigModel):
    """What is initialised from data: one entry of ``range``, or a list of them for different layers."""

    range: RangeInitializer | list[RangeInitializer] = Field(default_factory=RangeInitializer)
    precision: PrecisionInitializer | None = None
    batchnorm_adaptation: BatchnormAdaptation = Field(default_factory=BatchnormAdaptation)

    @field_validator("range", mode="before")
    @classmethod
    def _checked(cls, value: Any) -> Any:
        """Check entries here, so that errors name the key and not the union."""
        if isinstance(value, list):
            return [RangeInitializer.model_validate(each) for each in value]
        return RangeInitializer.model_validate(value) if isinstance(value, Mapping) else value


class TensorConfig(ConfigModel):
    """How a tensor is quantized; None leaves it to the preset.

    Fields:
        bits: 2 to 8.
        mode: ``symmetric`` or ``asymmetric``.
        per_channel: a range for each channel: of the output for weights, of the input for activations.
        signed: for symmetric activations, whether the integers are signed; None: as the data are.
    """

    bits: int = Field(default=8, ge=2, le=8)
    mode: Literal["symmetric", "asymmetric"] | None = None
    per_channel: bool | None = None
    signed: bool | None = None

    def spec(
        self, signed: bool, channel_axis: int | None = None, half_range: bool = False
    ) -> QuantizationSpec:
        """The specification of a tensor's simulator.

        Args:
            signed: whether the integers are signed.
            channel_axis: axis of the channels that have ranges of their own.
            half_range: use half of the integers, so that sums of products of two 8-bit integers fit in 16.
        """
        # Symmetric and unsigned is a range from zero on, which the asymmetric scheme has without an offset.
        symmetric = self.mode == "symmetric" and signed
        return _IntegerSpec(
            dtype=getattr(torch, f"{'int' if signed else 'uint'}{_storage_bits(self.bits)}"),
            qscheme=QuantizationScheme.SYMMETRIC if symmetric else QuantizationScheme.ASYMMETRIC,
            granularity=(
                PerTensorGranularity() if channel_axis is None else PerChannelGranularity(axis=channel_axis)
            ),
            _bits=self.bits,
            _used_bits=self.bits - half_range,
        )


def _storage_bits(bits: int) -> int:
    return min(each for each in (2, 4, 8) if each >= bits)


class _IntegerSpec(QuantizationSpec):
    """Integers of any width, in the next wider type that torch has."""

    def __init__(self, _bits: int, _used_bits: int, **fields: Any) -> None:
        super().__init__(**fields)
        signed = not str(self.dtype).startswith("torch.uint")
        low = -(2 ** (_used_bits - 1)) if signed else 0
        # Each of these is computed once, by the base, unless it is here already.
        vars(self).update(n_bits=_bits, quant_min=low, quant_max=2**_used_bits - 1 + low)


class TensorGroupConfig(TensorConfig):
    """How all weights, or all activations, are quantized.

    Fields:
        ignored_scopes: layers whose tensors of the group stay as they are.
        target_scopes: the only layers whose tensors of the group are quantized.
        logarithm_scale: with ``learnable_ranges``, train the logarithm of a range.
        unified_scale_ops: for activations, as in NNCF; every layer's input has its own range here.
    """

    ignored_scopes: ScopeList = Field(default_factory=list)
    target_scopes: ScopeList | None = None
    logarithm_scale: bool = False
    unified_scale_ops: list[list[str]] | None = None


class StagedParams(ConfigModel):
    """Staged training: the epochs from which activations and weights are quantized, and its optimizer.

    Fields:
        activations_quant_start_epoch, weights_quant_start_epoch: when they begin.
        schedule: the quantizer's schedule, which counts optimizer steps, instead: weights and activations are
            quantized from ``enable_fake_quant`` on; ranges that follow what is observed do so from
            ``enable_observer`` to ``disable_observer``.
        batch_multiplier: batches whose gradients are summed for an optimizer step.
        lr_poly_drop_start_epoch, lr_poly_drop_duration_epochs: the polynomial decay of the learning rate.
        disable_wd_start_epoch: from when on there is no weight decay.
        base_lr, base_wd: learning rate and weight decay at the start.
    """

    activations_quant_start_epoch: int = Field(default=0, ge=0)
    weights_quant_start_epoch: int = Field(default=0, ge=0)
    schedule: QATSchedule | None = None
    batch_multiplier: int = Field(default=1, ge=1)
    lr_poly_drop_start_epoch: int | None = Field(default=None, ge=0)
    lr_poly_drop_duration_epochs: int = Field(default=30, ge=1)
    disable_wd_start_epoch: int | None = Field(default=None, ge=0)
    base_lr: float | None = Field(default=None, gt=0)
    base_wd: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _one_start(self) -> "StagedParams":
        epochs = self.activations_quant_start_epoch or self.weights_quant_start_epoch
        if self.schedule is not None and epochs:
            raise ValueError("schedule excludes activations_quant_start_epoch and weights_quant_start_epoch")
        return self

    def starts_at_once(self, part: str) -> bool:
        """Whether ``"weights"`` or ``"activations"`` are quantized from the first step on."""
        if self.schedule is not None:
            return self.schedule.enable_fake_quant == 0
        return bool(getattr(self, f"{part}_quant_start_epoch") == 0)


class ScopeOverrides(ConfigModel):
    """What differs for some layers, by scope; the last one that matches wins."""

    weights: dict[str, dict[str, Any]] = Field(default_factory=dict)
    activations: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_entries(self) -> "ScopeOverrides":
        for entry in (*self.weights.values(), *self.activations.values()):
            TensorConfig.model_validate(entry)
        return self


class QuantizationConfig(AlgorithmConfig):
    """Configuration of quantization.

    Fields:
        preset: ``performance``, all symmetric; ``mixed``, symmetric weights and asymmetric activations.
        mode, bits: of weights and activations where these say nothing themselves.
        weights, activations: what differs from the preset.
        scope_overrides: what differs for some layers.
        quantize_inputs: whether layers that take the model's input quantize it.
        quantize_outputs: whether the model's outputs are quantized.
        learnable_ranges: train the ranges with the weights.
        overflow_fix: use half of the 8-bit integers for weights, in all layers (``enable``) or in the first
            (``first_layer_only``): where int8 products are summed in 16 bits, full ranges saturate.
        export_to_onnx_standard_ops: as in NNCF; exported models always have ONNX's own operators.
        initializer: ranges, precision and batch norm from data.
        params: staged start.
    """

    algorithm: Literal["quantization"]
    preset: Literal["performance", "mixed"] = "performance"
    mode: Literal["symmetric", "asymmetric"] | None = None
    bits: int | None = Field(default=None, ge=2, le=8)
    weights: TensorGroupConfig = Field(default_factory=TensorGroupConfig)
    activations: TensorGroupConfig = Field(default_factory=TensorGroupConfig)
    scope_overrides: ScopeOverrides = Field(default_factory=ScopeOverrides)
    quantize_inputs: bool = True
    quantize_outputs: bool = False
    learnable_ranges: bool = False
    overflow_fix: Literal["enable", "disable", "first_layer_only"] = "disable"
    export_to_onnx_standard_ops: bool = True
    initializer: Initializer = Field(default_factory=Initializer)
    params: StagedParams = Field(default_factory=StagedParams)

    def model_post_init(self, context: Any) -> None:
        """Fill in what the preset says."""
        for group, of_preset, per_channel in (
            ("weights", "symmetric", True),
            ("activations", "asymmetric" if self.preset == "mixed" else "symmetric", False),
        ):
            config: TensorGroupConfig = getattr(self, group)
            own_bits = "bits" in config.model_fields_set or self.bits is None
            filled = config.model_copy(
                update={
                    "bits": config.bits if own_bits else self.bits,
                    "mode": config.mode or self.mode or of_preset,
                    "per_channel": per_channel if config.per_channel is None else config.per_channel,
                }
            )
            object.__setattr__(self, group, filled)

    def range_initializers(self) -> list[RangeInitializer]:
        """The entries of ``initializer.range``, one or several."""
        entries = self.initializer.range
        return entries if isinstance(entries, list) else [entries]
