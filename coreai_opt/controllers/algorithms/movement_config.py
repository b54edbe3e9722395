"""Configuration of movement sparsity."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from coreai_opt.controllers.core.config import AlgorithmConfig, ConfigModel
from coreai_opt.controllers.core.masks import original
from coreai_opt.controllers.core.scopes import matching

__all__ = ["MovementSparsityConfig", "MovementSparsityParams", "SparseStructure"]


class MovementSparsityParams(ConfigModel):
    """Parameters of movement sparsity.

    Fields:
        warmup_start_epoch, warmup_end_epoch: between them the threshold rises; then the masks are fixed.
        importance_regularization_factor: factor on the loss.
        init_importance_threshold, final_importance_threshold: of the polynomial.
        power: of the polynomial.
        steps_per_epoch: optimizer steps in an epoch.
        enable_structured_masking: mask attention heads and feed-forward dimensions whole after warm-up.
    """

    warmup_start_epoch: float = Field(ge=0)
    warmup_end_epoch: float = Field(gt=0)
    importance_regularization_factor: float = Field(ge=0)
    init_importance_threshold: float = -1.0
    final_importance_threshold: float = 0.0
    power: float = Field(default=3.0, gt=0)
    steps_per_epoch: int | None = Field(default=None, gt=0)
    enable_structured_masking: bool = True

    @model_validator(mode="after")
    def _in_order(self) -> "MovementSparsityParams":
        if self.warmup_end_epoch <= self.warmup_start_epoch:
            raise ValueError(
                f"warmup_end_epoch must come after warmup_start_epoch; got {self.warmup_end_epoch} and "
                f"{self.warmup_start_epoch}"
            )
        if self.final_importance_threshold < self.init_importance_threshold:
            raise ValueError(
                f"final_importance_threshold must not be below init_importance_threshold; got "
                f"{self.final_importance_threshold} and {self.init_importance_threshold}"
            )
        return self


class SparseStructure(ConfigModel):
    """What is masked together in some layers during warm-up.

    Fields:
        mode: ``fine``, single elements; ``block``, blocks; ``per_dim``, rows or columns.
        sparse_factors: rows and columns of a block.
        axis: 0 for rows, 1 for columns.
        target_scopes: the layers; see :mod:`.scopes`.
    """

    mode: Literal["fine", "block", "per_dim"] = "fine"
    sparse_factors: tuple[int, int] | None = None
    axis: Literal[0, 1] | None = None
    target_scopes: list[str]

    @field_validator("target_scopes", mode="before")
    @classmethod
    def _one_is_a_list(cls, scopes: Any) -> Any:
        return [scopes] if isinstance(scopes, str) else scopes

    @model_validator(mode="after")
    def _fits_its_mode(self) -> "SparseStructure":
        for key, mode in (("sparse_factors", "block"), ("axis", "per_dim")):
            if (getattr(self, key) is not None) != (self.mode == mode):
                raise ValueError(f"{key} belongs to mode {mode!r}, and only there; got mode {self.mode!r}")
        if self.sparse_factors is not None and min(self.sparse_factors) < 1:
            raise ValueError(f"sparse_factors must be positive; got {self.sparse_factors}")
        return self

    def factors(self, weight: Tensor) -> tuple[int, int]:
        """Rows and columns of ``weight`` that share a score."""
        if self.sparse_factors is not None:
            return self.sparse_factors
        if self.axis is None:
            return 1, 1
        return (1, weight.shape[1]) if self.axis == 0 else (weight.shape[0], 1)


class MovementSparsityConfig(AlgorithmConfig):
    """Configuration of movement sparsity.

    Fields:
        sparse_structure_by_scopes: what is masked together in which layers; elsewhere, single elements.
    """

    algorithm: Literal["movement_sparsity"]
    params: MovementSparsityParams
    sparse_structure_by_scopes: list[SparseStructure] = Field(default_factory=list)

    def factors(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
        """For each layer, the rows and columns of its weight that share a score.

        Raises:
            ValueError: a scope matches no module, a layer has two entries, or blocks do not divide a weight.
        """
        found: dict[str, tuple[int, int]] = {}
        for entry in self.sparse_structure_by_scopes:
            matched = matching(entry.target_scopes, model, "sparse_structure_by_scopes", self.validate_scopes)
            for name in (name for name in layers if name in matched):
                if name in found:
                    raise ValueError(f"sparse_structure_by_scopes has more than one entry for {name!r}")
                weight = original(layers[name])
                rows, columns = found[name] = entry.factors(weight)
                if weight.shape[0] % rows or weight.shape[1] % columns:
                    raise ValueError(
                        f"sparse_structure_by_scopes: blocks of {rows} x {columns} do not divide the weight "
                        f"of {name!r}, {weight.shape[0]} x {weight.shape[1]}"
                    )
        return {name: found.get(name, (1, 1)) for name in layers}
