"""Pruning: zeros in place of the values that matter least."""

from coreai_opt.pruning.config import MagnitudePrunerConfig, ModuleMagnitudePrunerConfig
from coreai_opt.pruning.magnitude_pruner import MagnitudePruner
from coreai_opt.pruning.spec import PruningSpec

__all__ = ["MagnitudePruner", "MagnitudePrunerConfig", "ModuleMagnitudePrunerConfig", "PruningSpec"]
