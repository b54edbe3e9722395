"""The specification of a tensor's pruning."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PrivateAttr, SerializeAsAny, field_validator, model_validator

from coreai_opt.common import CompressionType
from coreai_opt.config.spec.base import CompressionSpec
from coreai_opt.pruning.spec.prune import PruneImplBase
from coreai_opt.pruning.spec.scheme import NMStructured, PruningScheme, Unstructured

__all__ = ["PruningSpec", "default_weight_pruning_spec"]


class PruningSpec(CompressionSpec):
    """How to prune one tensor. Immutable.

    Fields:
        target_sparsity: fraction of elements to prune, in [0, 1]. An N:M scheme has one of its own,
            ``1 - n / m``: it may be left out, and must not be another.
        pruning_scheme: which elements are pruned together; also a dict ``{"type": "unstructured", ...}``.
        pruning_algo: a registered class that makes the mask, also by key.

    Raises:
        pydantic.ValidationError: a value is not allowed, or two exclude each other.
        KeyError: the ``type`` of a scheme is not registered.
    """

    _compression_type: CompressionType = PrivateAttr(default=CompressionType.PRUNING)

    target_sparsity: float = Field(default=0.5, ge=0.0, le=1.0)
    pruning_scheme: Annotated[
        SerializeAsAny[PruningScheme], BeforeValidator(PruningScheme.maybe_build_from_dict)
    ] = Field(default_factory=Unstructured)
    # The default is a key, which validation replaces by the class.
    pruning_algo: type[PruneImplBase] = Field(default="default", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _complete_sparsity(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "target_sparsity" in data or "pruning_scheme" not in data:
            return data
        scheme = PruningScheme.maybe_build_from_dict(data["pruning_scheme"])
        return data | {"target_sparsity": scheme.sparsity} if isinstance(scheme, NMStructured) else data

    @field_validator("pruning_algo", mode="before")
    @classmethod
    def convert_pruning_algo(cls, data: Any) -> Any:
        """The algorithm's class, from itself or its key."""
        return PruneImplBase.resolve(data)

    @model_validator(mode="after")
    def _check_sparsity_of_pattern(self) -> "PruningSpec":
        scheme = self.pruning_scheme
        if isinstance(scheme, NMStructured) and round(scheme.m * self.target_sparsity) != scheme.m - scheme.n:
            raise ValueError(
                f"target_sparsity must be {scheme.sparsity:g} where {scheme.n} of every {scheme.m} elements "
                f"stay (or be left out); got {self.target_sparsity:g}"
            )
        return self


def default_weight_pruning_spec() -> PruningSpec:
    """Half of the elements, each by itself."""
    return PruningSpec()
