"""Specifications of palettization, and the strategies and simulators that they name."""

from coreai_opt.palettization.spec.dkm import *
from coreai_opt.palettization.spec.granularity import *
from coreai_opt.palettization.spec.spec import *
from coreai_opt.palettization.spec.straight_through import *
from coreai_opt.palettization.spec.training_strategy import *
