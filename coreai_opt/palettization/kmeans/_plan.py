"""What is palettized in a model: for each weight that can be, a simulator."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from coreai_opt._state_tensors import StateTarget, configured_targets, record_state_uses
from coreai_opt.palettization.config import KMeansPalettizerConfig, ModuleKMeansPalettizerConfig, PATSchedule
from coreai_opt.palettization.kmeans._supported import OP_TYPES
from coreai_opt.palettization.kmeans.kmeans_fake_palettize import _KMeansFakePalettize
from coreai_opt.palettization.spec import PalettizationSpec
from coreai_opt.palettization.spec.errors import (
    _IncompatibleClusterDimError,
    _IncompatibleGranularityError,
)

__all__ = ["Planned", "plan"]

logger = logging.getLogger("coreai_opt.palettization.kmeans.palettizer")

_FUNCTIONS: dict[str | None, Callable[..., Any]] = {op_type: each for each, op_type in OP_TYPES.items()}


class Planned(NamedTuple):
    """A weight, its simulator, and when to palettize it."""

    target: StateTarget
    simulator: _KMeansFakePalettize
    schedule: PATSchedule | None

    @property
    def original_name(self) -> str:
        """Name of the weight once it is parametrized."""
        path, _, attribute = self.target.fqn.rpartition(".")
        return ".".join(filter(None, (path, "parametrizations", attribute, "original")))


def plan(
    model: nn.Module,
    config: KMeansPalettizerConfig,
    example_inputs: tuple[Any, ...],
    state_dict: Mapping[str, Any] | None = None,
    left_out: dict[str, str] | None = None,
) -> list[Planned]:
    """The weights that ``config`` names and that their specifications fit; of the others the log warns.

    Args:
        model: the model.
        config: its configuration.
        example_inputs: for one forward.
        state_dict: of a prepared model, if its weights will take the place of those that there are.
        left_out: gets the weights that have a specification which does not fit, and why.
    """
    uses = record_state_uses(model, example_inputs, OP_TYPES)
    functions = {id(tensor): _FUNCTIONS.get(use.op_type) for use in uses for tensor in use.tensors}
    planned = []
    for target in configured_targets(model, config, uses):
        tensor = target.tensor
        module_config = cast(ModuleKMeansPalettizerConfig, target.config)
        simulator = _build(target, module_config, functions.get(id(tensor)))
        found = Planned(target, simulator, module_config.pat_schedule)
        loaded = None if state_dict is None else state_dict.get(found.original_name)
        fits = isinstance(loaded, Tensor) and loaded.shape == tensor.shape
        try:
            _check(simulator, cast(Tensor, loaded) if fits else tensor)
        except (_IncompatibleGranularityError, _IncompatibleClusterDimError) as error:
            logger.warning(f"Disabling palettization for weight {target.fqn!r}: {error}")
            if left_out is not None:
                left_out[target.fqn] = f"that palettes do not fit ({simulator.granularity!r})"
            continue
        planned.append(found)
    if not planned:
        logger.warning("Nothing is palettized: the configuration names no weight that an operation reads")
    return planned


def _check(simulator: _KMeansFakePalettize, weight: Tensor) -> None:
    """An error of incompatibility unless the weight can be cut into blocks and vectors.

    Raises:
        RuntimeError: it is pruned, and the values that are kept cannot be stored as vectors.
    """
    try:
        # What is stored of a pruned weight need not divide its channels.
        if simulator.cluster_dim > 1:
            simulator.detect_sparsity(weight)
    except ValueError as error:
        raise RuntimeError(str(error)) from error
    simulator.blocks(weight)


def _build(
    target: StateTarget, config: ModuleKMeansPalettizerConfig, function: Callable[..., Any] | None
) -> _KMeansFakePalettize:
    spec = cast(PalettizationSpec, target.spec)
    simulator = _KMeansFakePalettize(
        **spec.model_dump_preserve_objects(),
        # Rounding is for scalars.
        enable_fast_kmeans_mode=config.enable_fast_kmeans_mode and spec.cluster_dim == 1,
        rounding_precision=config.rounding_precision,
        vector_kmeans_config=config.vector_kmeans_config if spec.cluster_dim > 1 else None,
        op_to_optimize=function,
    )
    simulator.tensor_fqn = target.fqn
    simulator.train(target.owners[0][0].training)
    return simulator.to(target.tensor.device)
