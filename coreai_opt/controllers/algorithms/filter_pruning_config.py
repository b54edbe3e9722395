"""Configuration of filter pruning."""

from typing import Literal

from pydantic import Field, model_validator

from coreai_opt.controllers.algorithms.legr import LegrParams
from coreai_opt.controllers.core.config import AlgorithmConfig, BatchnormInitializer
from coreai_opt.controllers.schedules.params import PrunersSchedule, ScheduleParams

__all__ = ["FilterPruningConfig", "FilterPruningParams"]


class FilterPruningParams(ScheduleParams):
    """Parameters of filter pruning.

    Fields:
        schedule: ``exponential``, ``exponential_with_bias`` or ``baseline``; or a schedule of the pruner.
        pruning_target: share of the filters to prune.
        pruning_flops_target: share of the FLOPs to save, instead.
        num_init_steps, pruning_steps: epochs of warm-up, and of pruning.
        filter_importance: norm of a filter, or its distance to all others of its layer.
        all_weights: one ranking over all clusters, of importances relative to their cluster's norm.
        prune_first_conv: prune what reads the model's input.
        prune_downsample_convs: prune convolutions with strides.
        prune_batch_norms: as in NNCF, always: a channel without its batch norm would not be zero.
        legr_params: of ``learned_ranking``, see :mod:`.legr`.
        save_ranking_coeffs_path, load_ranking_coeffs_path: files of the learned ranking.
    """

    schedule: Literal["exponential", "exponential_with_bias", "baseline"] | PrunersSchedule = "exponential"
    pruning_target: float = Field(default=0.5, ge=0, le=1)
    pruning_flops_target: float | None = Field(default=None, ge=0, le=1)
    num_init_steps: int = Field(default=0, ge=0)
    pruning_steps: int = Field(default=100, ge=1)
    filter_importance: Literal["L1", "L2", "geometric_median"] = "L2"
    interlayer_ranking_type: Literal["unweighted_ranking", "learned_ranking"] = "unweighted_ranking"
    legr_params: LegrParams = Field(default_factory=LegrParams)
    save_ranking_coeffs_path: str | None = None
    load_ranking_coeffs_path: str | None = None
    all_weights: bool = False
    prune_first_conv: bool = False
    prune_downsample_convs: bool = False
    prune_batch_norms: Literal[True] = True

    @model_validator(mode="after")
    def _one_target(self) -> "FilterPruningParams":
        if self.pruning_flops_target is not None and "pruning_target" in self.model_fields_set:
            raise ValueError("pruning_target and pruning_flops_target exclude each other: give one")
        if self.interlayer_ranking_type == "learned_ranking":
            self.all_weights = True  # a ranking of all filters together
        if self.all_weights and (self.update_per_optimizer_step or not isinstance(self.schedule, str)):
            raise ValueError(
                "a schedule that moves at optimizer steps excludes all_weights: a ranking over all layers "
                "waits for the device, and a step must not"
            )
        return self

    @property
    def freeze_epoch(self) -> float:
        """When warm-up and pruning are over."""
        return self.num_init_steps + self.pruning_steps

    def exponential_epochs(self) -> tuple[int, int]:
        """From the end of the warm-up; the target is reached in the last epoch of pruning."""
        return self.num_init_steps, self.pruning_steps - 1


class FilterPruningConfig(AlgorithmConfig):
    """Configuration of filter pruning.

    Fields:
        pruning_init: level at the start.
        initializer: ``{"batchnorm_adaptation": {"num_bn_adaptation_samples": ...}}``, if asked for.
        params: what is pruned, and when.
    """

    algorithm: Literal["filter_pruning"]
    pruning_init: float = Field(default=0.0, ge=0, le=1)
    initializer: BatchnormInitializer = Field(default_factory=BatchnormInitializer)
    params: FilterPruningParams = Field(default_factory=FilterPruningParams)
