"""Configuration of pruning: what to prune, and when."""

from coreai_opt.pruning.config.magnitude_pruner_config import *
from coreai_opt.pruning.config.sparsity_schedule import *
