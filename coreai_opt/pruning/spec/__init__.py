"""Specifications of pruning, and the components that they name."""

from coreai_opt.pruning.spec.prune import *
from coreai_opt.pruning.spec.scheme import *
from coreai_opt.pruning.spec.spec import *
