"""Compression as training loops see it: controllers, schedulers, losses and states, as in NNCF 2.x."""

from coreai_opt.controllers.algorithms.const_sparsity import ConstSparsityController
from coreai_opt.controllers.algorithms.filter_pruning import FilterPruningController
from coreai_opt.controllers.algorithms.filter_pruning_builder import FilterPruningBuilder
from coreai_opt.controllers.algorithms.knowledge_distillation import KnowledgeDistillationController
from coreai_opt.controllers.algorithms.magnitude_sparsity import MagnitudeSparsityController
from coreai_opt.controllers.algorithms.movement_sparsity import MovementSparsityController
from coreai_opt.controllers.algorithms.palettization import PalettizationController
from coreai_opt.controllers.algorithms.quantization import QuantizationController
from coreai_opt.controllers.algorithms.quantization_builder import QuantizationBuilder
from coreai_opt.controllers.algorithms.rb_sparsity import RBSparsityController
from coreai_opt.controllers.core.api import (
    CompressionAlgorithmBuilder,
    CompressionAlgorithmController,
    CompressionLoss,
    CompressionScheduler,
    CompressionStage,
)
from coreai_opt.controllers.core.base import (
    BaseCompressionAlgorithmBuilder,
    BaseCompressionAlgorithmController,
)
from coreai_opt.controllers.core.composite import (
    CompositeCompressionAlgorithmBuilder,
    CompositeCompressionAlgorithmController,
)
from coreai_opt.controllers.core.config import AlgorithmConfig, ControllerConfig
from coreai_opt.controllers.core.create import create_compressed_model, register_default_init_args
from coreai_opt.controllers.core.plan import Plan
from coreai_opt.controllers.core.schedulers import BaseCompressionScheduler
from coreai_opt.controllers.core.statistics import AlgorithmStatistics, CompressionStatistics
from coreai_opt.controllers.nncf1 import CompressionAlgorithm
from coreai_opt.controllers.schedules.levels import LevelScheduler
from coreai_opt.controllers.training.accuracy_aware import (
    AdaptiveCompressionTraining,
    EarlyExitTraining,
    TrainingReport,
    create_accuracy_aware_training_loop,
)
from coreai_opt.controllers.training.staged import StagedWorker

__all__ = [
    "AdaptiveCompressionTraining",
    "AlgorithmConfig",
    "AlgorithmStatistics",
    "BaseCompressionAlgorithmBuilder",
    "BaseCompressionAlgorithmController",
    "BaseCompressionScheduler",
    "CompositeCompressionAlgorithmBuilder",
    "CompositeCompressionAlgorithmController",
    "CompressionAlgorithm",
    "CompressionAlgorithmBuilder",
    "CompressionAlgorithmController",
    "CompressionLoss",
    "CompressionScheduler",
    "CompressionStage",
    "CompressionStatistics",
    "ConstSparsityController",
    "ControllerConfig",
    "EarlyExitTraining",
    "FilterPruningBuilder",
    "FilterPruningController",
    "KnowledgeDistillationController",
    "LevelScheduler",
    "MagnitudeSparsityController",
    "MovementSparsityController",
    "PalettizationController",
    "Plan",
    "QuantizationBuilder",
    "QuantizationController",
    "RBSparsityController",
    "StagedWorker",
    "TrainingReport",
    "create_accuracy_aware_training_loop",
    "create_compressed_model",
    "register_default_init_args",
]
