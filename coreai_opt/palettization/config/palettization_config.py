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
    "VectorKMeansConfig",
]


class PATSchedule(BaseModel):
    """When palettization-aware training palettizes. Immutable.

    Fields:
        enable_fake_palettize: the step from which on weights are palettized. Before it they train as they
            are, and at that step they are clustered anew.
    """

    model_config = ConfigDict(frozen=True)

    enable_fake_palettize: Annotated[int, Field(ge=0)] = 0


class VectorKMeansConfig(BaseModel):
    """How much k-means of vectors (``cluster_dim`` above one) searches. Immutable.

    Without such a configuration the search is longer, by a method of its own, and its error lower.

    Fields:
        n_local_trials: candidates for each start of k-means++, of which the best is taken; None for
            ``2 + int(ln k)`` for k clusters.
        n_init: how many times k-means runs from other starts; the run with the least error counts.
        max_iter: iterations of a run at most.
        tol: a run ends when an iteration lowers its error by less than this share.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_local_trials: Annotated[int, Field(gt=0)] | None = None
    n_init: Annotated[int, Field(gt=0)] = 5
    max_iter: Annotated[int, Field(gt=0)] = 300
    tol: Annotated[float, Field(ge=0)] = 1e-4


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
        vector_kmeans_config: how much k-means of vectors searches; only where a specification has a
            ``cluster_dim`` above one. None for the default search.
    """

    presets: ClassVar[ModuleKMeansPalettizerPresets["ModuleKMeansPalettizerConfig"]] = (
        ModuleKMeansPalettizerPresets()
    )

    enable_fast_kmeans_mode: bool = Field(default=True, validate_default=True)
    rounding_precision: Annotated[int, Field(gt=0)] = 4
    pat_schedule: PATSchedule | None = None
    vector_kmeans_config: VectorKMeansConfig | None = None

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

    @field_validator(
        "op_state_spec", "module_state_spec", "op_type_config", "op_name_config", "vector_kmeans_config"
    )
    @classmethod
    def _check_vector_kmeans(cls, value: Any, info: ValidationInfo) -> Any:
        fields = {**info.data, str(info.field_name): value}
        # Not among them yet where another field is checked in the constructor.
        if fields.get("vector_kmeans_config") is not None:
            _require_vectors(fields)
        return value

    def validate_vector_kmeans_has_vector_spec(self) -> "ModuleKMeansPalettizerConfig":
        """ValueError if there is a ``vector_kmeans_config`` and no palette of vectors. Returns self."""
        if self.vector_kmeans_config is not None:
            _require_vectors({name: getattr(self, name) for name in type(self).model_fields})
        return self


def _require_vectors(fields: Mapping[str, Any]) -> None:
    states = [fields.get("op_state_spec"), fields.get("module_state_spec")]
    for operations in ("op_type_config", "op_name_config"):
        states += [entry.op_state_spec for entry in (fields.get(operations) or {}).values() if entry]
    specs = [spec for state in states for spec in (state or {}).values() if spec is not None]
    if not any(spec.cluster_dim > 1 for spec in specs):
        raise ValueError(
            "vector_kmeans_config is for palettes of vectors, but no specification of this module "
            "configuration has a cluster_dim above 1"
        )


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

    presets: ClassVar[KMeansPalettizerPresets["KMeansPalettizerConfig"]] = KMeansPalettizerPresets()
