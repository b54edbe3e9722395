"""Configuration of palettization."""

from coreai_opt.palettization.config.palettization_config import *
