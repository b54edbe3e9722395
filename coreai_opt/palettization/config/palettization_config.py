"""Which weights of a model are palettized, how, and when."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from coreai_opt.config.compression_config import (
    CompressionConfig,
    ModuleCompressionConfig,
    OpCompressionConfig,
    WeightOnlyModuleValidationMixin,
    WeightOnlyOpValidationMixin,
)
from coreai_opt.palettization.config._presets import KMeansPalettizerPresets, ModuleKMeansPalettizerPresets
from coreai_opt.palettization.spec import PalettizationSpec, default_weight_palettization_spec

__all__ = [
    "KMeansPalettizerConfig",
    "ModuleKMeansPalettizerConfig",
    "OpKMeansPalettizerConfig",
    "PATSchedule",
]


class PATSchedule(BaseModel):
    """When palettization-aware training palettizes. Immutable.

    Fields:
        enable_fake_palettize: the step from which on weights are palettized. Before it they train as they
            are, and at that step they are clustered anew.
    """

    model_config = ConfigDict(frozen=True)

    enable_fake_palettize: Annotated[int, Field(ge=0)] = 0


class OpKMeansPalettizerConfig(WeightOnlyOpValidationMixin, OpCompressionConfig[PalettizationSpec]):
    """How to palettize the weights of an operation. See :class:`OpCompressionConfig`."""

    @classmethod
    def get_default_state_spec(cls) -> dict[str, Any]:
        """The default specification for weights, those of attention's inputs included."""
        return {
            "weight": default_weight_palettization_spec(),
            "in_proj_weight": default_weight_palettization_spec(),
        }


class ModuleKMeansPalettizerConfig(
    WeightOnlyModuleValidationMixin, ModuleCompressionConfig[OpKMeansPalettizerConfig, PalettizationSpec]
):
    """How to palettize the weights in a module. See :class:`ModuleCompressionConfig`.

    Fields:
        enable_fast_kmeans_mode: cluster values rounded to ``rounding_precision`` decimals, of which there are
            fewer. For palettes of scalars.
        rounding_precision: decimals kept in fast mode.
        pat_schedule: when to palettize in training; None for from the first step on.
    """

    presets: ClassVar[ModuleKMeansPalettizerPresets] = ModuleKMeansPalettizerPresets()

    enable_fast_kmeans_mode: bool = True
    rounding_precision: Annotated[int, Field(gt=0)] = 4
    pat_schedule: PATSchedule | None = None

    # Checked field by field: a refused assignment then leaves the configuration as it was.
    @field_validator("op_state_spec", "enable_fast_kmeans_mode")
    @classmethod
    def _check_fast_mode(cls, value: Any, info: ValidationInfo) -> Any:
        fields = {"enable_fast_kmeans_mode": False, **info.data, str(info.field_name): value}
        if fields["enable_fast_kmeans_mode"]:
            _refuse_vectors(fields.get("op_state_spec"))
        return value

    def validate_fast_kmeans_cluster_dim_constraint(self) -> "ModuleKMeansPalettizerConfig":
        """ValueError if a palette of vectors is asked for in fast mode. Returns self."""
        if self.enable_fast_kmeans_mode:
            _refuse_vectors(self.op_state_spec)
        return self


def _refuse_vectors(specs: Mapping[str, PalettizationSpec | None] | None) -> None:
    for state, spec in (specs or {}).items():
        if spec is not None and spec.cluster_dim > 1:
            raise ValueError(
                f"enable_fast_kmeans_mode rounds scalars, so cluster_dim must be 1; got cluster_dim="
                f"{spec.cluster_dim} for {state!r}. Set enable_fast_kmeans_mode=False."
            )


class KMeansPalettizerConfig(CompressionConfig[ModuleKMeansPalettizerConfig]):
    """How to palettize a model. See :class:`CompressionConfig`."""

    _CONFIG_KEY: ClassVar[str] = "kmeans_palettization_config"
    _SPEC_KEY: ClassVar[str] = "palettization_spec"

    presets: ClassVar[KMeansPalettizerPresets] = KMeansPalettizerPresets()
