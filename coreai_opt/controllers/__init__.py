"""Compression as training loops see it: controllers, schedulers, losses and states, as in NNCF 2.x."""

from coreai_opt.controllers.api import (
    CompressionAlgorithmBuilder,
    CompressionAlgorithmController,
    CompressionLoss,
    CompressionScheduler,
    CompressionStage,
)
from coreai_opt.controllers.base import (
    BaseCompressionAlgorithmBuilder,
    BaseCompressionAlgorithmController,
)
from coreai_opt.controllers.composite import (
    CompositeCompressionAlgorithmBuilder,
    CompositeCompressionAlgorithmController,
)
from coreai_opt.controllers.config import ControllerConfig
from coreai_opt.controllers.const_sparsity import ConstSparsityController
from coreai_opt.controllers.create import create_compressed_model, register_default_init_args
from coreai_opt.controllers.filter_pruning import FilterPruningController
from coreai_opt.controllers.knowledge_distillation import KnowledgeDistillationController
from coreai_opt.controllers.magnitude_sparsity import MagnitudeSparsityController
from coreai_opt.controllers.movement_sparsity import MovementSparsityController
from coreai_opt.controllers.palettization import PalettizationController
from coreai_opt.controllers.quantization import QuantizationController
from coreai_opt.controllers.rb_sparsity import RBSparsityController
from coreai_opt.controllers.statistics import CompressionStatistics

__all__ = [
    "BaseCompressionAlgorithmBuilder",
    "BaseCompressionAlgorithmController",
    "CompositeCompressionAlgorithmBuilder",
    "CompositeCompressionAlgorithmController",
    "CompressionAlgorithmBuilder",
    "CompressionAlgorithmController",
    "CompressionLoss",
    "CompressionScheduler",
    "CompressionStage",
    "CompressionStatistics",
    "ConstSparsityController",
    "ControllerConfig",
    "FilterPruningController",
    "KnowledgeDistillationController",
    "MagnitudeSparsityController",
    "MovementSparsityController",
    "PalettizationController",
    "QuantizationController",
    "RBSparsityController",
    "create_compressed_model",
    "register_default_init_args",
]
