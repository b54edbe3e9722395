"""Configuration of magnitude pruning."""

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, SerializeAsAny

from coreai_opt.config.compression_config import (
    CompressionConfig,
    ModuleCompressionConfig,
    OpCompressionConfig,
    WeightOnlyModuleValidationMixin,
    WeightOnlyOpValidationMixin,
)
from coreai_opt.pruning.config.sparsity_schedule import SparsityScheduleBase
from coreai_opt.pruning.spec.spec import PruningSpec, default_weight_pruning_spec

__all__ = ["MagnitudePrunerConfig", "ModuleMagnitudePrunerConfig", "OpMagnitudePrunerConfig"]


class OpMagnitudePrunerConfig(WeightOnlyOpValidationMixin, OpCompressionConfig[PruningSpec]):
    """How to prune the parameters of an operation. By default its weight, by half."""

    @classmethod
    def get_default_state_spec(cls) -> dict[str, Any]:
        """The default specification for the weight, and for the joined weight of attention's projections."""
        return {"weight": default_weight_pruning_spec(), "in_proj_weight": default_weight_pruning_spec()}


class ModuleMagnitudePrunerConfig(
    WeightOnlyModuleValidationMixin, ModuleCompressionConfig[OpMagnitudePrunerConfig, PruningSpec]
):
    """How to prune the parameters of a module.

    Fields:
        sparsity_schedule: how the sparsity grows; None for the target from the start. Also a dict
            ``{"type": "polynomial_decay", ...}``.
    """

    sparsity_schedule: Annotated[
        SerializeAsAny[SparsityScheduleBase] | None,
        BeforeValidator(SparsityScheduleBase.maybe_build_from_dict),
    ] = None


class MagnitudePrunerConfig(CompressionConfig[ModuleMagnitudePrunerConfig]):
    """How to prune a model.

    Fields:
        global_threshold: rank the elements of all unstructured tensors with the same target and schedule
            together, so that the sparsity holds for them as a whole; else each tensor by itself.
    """

    _CONFIG_KEY: ClassVar[str] = "magnitude_pruning_config"
    _SPEC_KEY: ClassVar[str] = "pruning_spec"

    global_threshold: bool = False
