"""What controllers and builders have in common."""

import logging
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from coreai_opt._sharding.layout import refuse
from coreai_opt._utils.registry_utils import ClassRegistryMixin
from coreai_opt.common import ExportBackend
from coreai_opt.controllers.core.api import (
    CompressionAlgorithmBuilder,
    CompressionAlgorithmController,
    CompressionLoss,
    CompressionScheduler,
    CompressionStage,
    State,
)
from coreai_opt.controllers.core.config import AlgorithmConfig
from coreai_opt.controllers.core.context import BuildContext
from coreai_opt.controllers.core.copies import copy_model
from coreai_opt.controllers.core.distributed import synchronize
from coreai_opt.controllers.core.export import (
    BACKENDS,
    export_lowered_model,
    opset_of,
    positional_arguments,
    split_arguments,
    suffix_of,
)
from coreai_opt.controllers.core.inputs import Batch, example_inputs
from coreai_opt.controllers.core.layers import WEIGHTED
from coreai_opt.controllers.core.losses import ZeroCompressionLoss
from coreai_opt.controllers.core.lowering import LoweredActivation, LoweredWeight, lower_to
from coreai_opt.controllers.core.plan import Plan, PlannedChange
from coreai_opt.controllers.core.schedulers import BaseCompressionScheduler, StubScheduler
from coreai_opt.controllers.core.scopes import select_layers
from coreai_opt.controllers.core.state import check_plain, take
from coreai_opt.controllers.core.statistics import LeftWhole
from coreai_opt.export.saving import outputs_of, save_lowered

__all__ = ["MARK", "BaseCompressionAlgorithmBuilder", "BaseCompressionAlgorithmController"]

logger = logging.getLogger(__name__)

MARK = "_compressed_by"
"""Attribute of a compressed model: the names of the algorithms. Copies of the model have it, too."""


class BaseCompressionAlgorithmController(CompressionAlgorithmController):
    """The parts of a controller that do not depend on the algorithm.

    A subclass sets ``_loss`` and ``_scheduler`` where it has its own, and implements :meth:`statistics`,
    :meth:`compression_stage` and :meth:`strip_model`. What it must remember beside its scheduler and loss, it
    gives and takes in :meth:`_get_algorithm_state` and :meth:`_load_algorithm_state`.
    """

    def __init__(self, target_model: nn.Module) -> None:
        super().__init__(target_model)
        self._loss: CompressionLoss = ZeroCompressionLoss(target_model)
        self._scheduler: CompressionScheduler = BaseCompressionScheduler()
        self._name: str | None = None
        self._builder_state: State | None = None
        self._scheduler_is_disabled = False
        self.context = BuildContext()
        self.left_whole: list[LeftWhole] = []

    @property
    def loss(self) -> CompressionLoss:
        """See :class:`CompressionAlgorithmController`."""
        return self._loss

    @property
    def scheduler(self) -> CompressionScheduler:
        """See :class:`CompressionAlgorithmController`."""
        return self._scheduler

    @property
    def name(self) -> str:
        """The algorithm's name.

        Raises:
            RuntimeError: the builder has not set it.
        """
        if self._name is None:
            raise RuntimeError("the controller has no name: its builder sets it, with its state")
        return self._name

    @property
    def compression_rate(self) -> float:
        """What the algorithm counts as its rate, from 0 to 1."""
        return self._get_compression_rate()

    @compression_rate.setter
    def compression_rate(self, compression_rate: float) -> None:
        highest = self.maximal_compression_rate
        if not isinstance(compression_rate, Real):
            raise TypeError(f"compression_rate must be a number; got {compression_rate!r}")
        if not 0 <= compression_rate <= highest:
            raise ValueError(f"compression_rate must be in [0, {highest:g}]; got {compression_rate!r}")
        self._set_compression_rate(float(compression_rate))

    @property
    def maximal_compression_rate(self) -> float:
        """1, unless the algorithm has less to give."""
        return 1.0

    @abstractmethod
    def _get_compression_rate(self) -> float: ...

    def _set_compression_rate(self, compression_rate: float) -> None:
        raise NotImplementedError(
            f"the compression rate of {self._name or type(self).__name__} follows from its configuration and "
            f"cannot be set"
        )

    def disable_scheduler(self) -> None:
        """See :class:`CompressionAlgorithmController`."""
        self._scheduler = StubScheduler.replacing(self._scheduler)
        self._scheduler_is_disabled = True

    def strip(self, do_copy: bool = True) -> nn.Module:
        """See :class:`CompressionAlgorithmController`."""
        refuse(self._model, "strip()")
        model = copy_model(self._model) if do_copy else self._model
        self.strip_model(model)
        if hasattr(model, MARK):
            delattr(model, MARK)
        return model

    @abstractmethod
    def strip_model(self, model: nn.Module) -> None:
        """Strip ``model``, the controlled one or a copy of it, in place."""

    def lower_model(self, model: nn.Module) -> None:
        """Strip ``model`` for a file; what :meth:`finish_lowering` still needs may stay in it."""
        self.strip_model(model)

    def finish_lowering(self, model: nn.Module) -> None:
        """Express in ONNX's operators what is left to be expressed, once all algorithms are stripped."""

    def lowered_weights(self, model: nn.Module, backend: ExportBackend) -> Iterator[LoweredWeight]:
        """How the algorithm compresses weights of ``model``, which is lowered: for Core AI and Core ML."""
        return iter(())

    def lowered_activations(self, model: nn.Module) -> Iterator[LoweredActivation]:
        """How the algorithm quantizes activations of ``model``, which is lowered."""
        return iter(())

    def prepare_for_export(self) -> None:
        """See :class:`CompressionAlgorithmController`."""
        self.strip(do_copy=False)

    def export_model(
        self,
        save_path: str | Path,
        save_format: str | None = None,
        input_names: list[str] | None = None,
        output_names: list[str] | None = None,
        model_args: tuple[Any, ...] | None = None,
    ) -> None:
        """See :class:`CompressionAlgorithmController`. The model itself stays as it is.

        Raises:
            ValueError: unknown format, a path with another suffix, arguments that do not end in a dict; or
                the format cannot hold how the model is compressed.
            ImportError: the format's package is not installed.
            OSError: the path cannot be written. No file is left half written.
        """
        suffix = suffix_of(save_format, save_path)
        split_arguments(model_args)  # raises before the work
        example = self.example_inputs()
        if suffix is not None:
            self._save(suffix, Path(save_path), example, input_names, output_names, model_args)
            return
        refuse(self._model, "export_model()")
        lowered = copy_model(self._model).eval()
        self.lower_model(lowered)
        self.finish_lowering(lowered)
        opset = opset_of(save_format)
        export_lowered_model(lowered, example, save_path, opset, input_names, output_names, model_args)

    def _save(
        self,
        suffix: str,
        path: Path,
        example: Batch,
        input_names: list[str] | None,
        output_names: list[str] | None,
        model_args: tuple[Any, ...] | None,
    ) -> None:
        """Write a kind of file of :mod:`coreai_opt.export`."""
        stripped = self.strip().eval().cpu()
        args = positional_arguments(stripped, example, model_args)
        expected = outputs_of(stripped, args)
        lowered = stripped
        backend = BACKENDS[suffix]
        if backend is not ExportBackend.Torch:
            refuse(self._model, "export_model()")
            lowered = copy_model(self._model).eval().cpu()
            self.lower_model(lowered)
            weights, activations = self.lowered_weights(lowered, backend), self.lowered_activations(lowered)
            lower_to(backend, lowered, list(weights), list(activations))
        save_lowered(lowered, path, args, expected, input_names=input_names, output_names=output_names)

    def distributed(self) -> None:
        """See :class:`CompressionAlgorithmController`."""
        synchronize(self)
        self.observe_over_ranks()

    def observe_over_ranks(self) -> None:
        """Let what follows data follow those of all ranks."""

    def plan(self, epochs: int, steps_per_epoch: int | None = None) -> Plan:
        """What will change at which step of a run from the beginning, as far as time alone decides.

        Args:
            epochs: of the run.
            steps_per_epoch: optimizer steps in an epoch; None for what the configuration or loader says.

        Raises:
            ValueError: ``epochs`` or ``steps_per_epoch`` is no positive number.
        """
        for name, value in (("epochs", epochs), ("steps_per_epoch", steps_per_epoch)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer; got {value!r}")
        if steps_per_epoch is None:
            steps_per_epoch = self.context.init_args.steps_per_epoch
        return Plan(epochs, self._planned(epochs, steps_per_epoch))

    def _planned(self, epochs: int, steps_per_epoch: int | None) -> list[PlannedChange]:
        planned = getattr(self._scheduler, "planned", None)
        changes = [] if planned is None else planned(epochs, steps_per_epoch)
        return [PlannedChange(epoch, step, self.name, what, level) for epoch, step, what, level in changes]

    def example_inputs(self) -> Batch:
        """Arguments for one forward of the model, from the configuration or the registered loader.

        Raises:
            ValueError: neither tells.
        """
        return example_inputs(self.context, self._model)

    def set_builder_state_with_name(self, name: str, builder_state: State) -> None:
        """See :class:`CompressionAlgorithmController`."""
        self._name = name
        self._builder_state = check_plain(builder_state, "builder_state")

    def _get_algorithm_state(self) -> State:
        return {}

    def _load_algorithm_state(self, state: State) -> None:
        pass

    def get_state(self) -> State:
        """See :class:`CompressionAlgorithmController`."""
        state = {
            "loss_state": self._loss.get_state(),
            "scheduler_state": self._scheduler.get_state(),
            "compression_stage": int(self.compression_stage()),
            "scheduler_is_disabled": self._scheduler_is_disabled,
            "algorithm_state": self._get_algorithm_state(),
        }
        return {self.name: check_plain(state)}

    def load_state(self, state: State) -> None:
        """See :class:`CompressionAlgorithmController`. Masks and parameters are in the model's state_dict.

        Raises:
            KeyError: an entry is missing.
        """
        if self.name not in state:
            return
        loss, scheduler, stage, disabled, own = take(
            state[self.name],
            "loss_state",
            "scheduler_state",
            "compression_stage",
            "scheduler_is_disabled",
            "algorithm_state",
            of=self.name,
        )
        if disabled and not self._scheduler_is_disabled:
            self.disable_scheduler()
        self._loss.load_state(loss)
        self._scheduler.load_state(scheduler)
        self._load_algorithm_state(own)
        if self.compression_stage() != stage:
            warnings.warn(
                f"{self.name} was saved {CompressionStage(stage).name} and is "
                f"{self.compression_stage().name} now: the configuration has changed",
                stacklevel=2,
            )

    def get_compression_state(self) -> State:
        """See :class:`CompressionAlgorithmController`."""
        if self._builder_state is None:
            raise RuntimeError(
                "the builder's state is not known: after it has built the controller, the builder calls "
                "set_builder_state_with_name, as create_compressed_model does"
            )
        return {"builder_state": {self.name: self._builder_state}, "ctrl_state": self.get_state()}


class BaseCompressionAlgorithmBuilder(ClassRegistryMixin, CompressionAlgorithmBuilder):
    """Base of the builders. A configuration names them by their key in this registry.

    A subclass says in ``config_type`` how its configuration looks, and implements ``_apply_to`` and
    ``build_controller``. ``order``: algorithms on one model are built in by ascending order.

    Args:
        config: the algorithm's configuration, a dict or the checked form.
        context: what else is known.
    """

    config_type: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig
    order: ClassVar[int] = 50

    def __init__(
        self, config: AlgorithmConfig | Mapping[str, Any], context: BuildContext | None = None
    ) -> None:
        if not isinstance(config, self.config_type):
            config = self.config_type.model_validate(config)
        self.config: Any = config
        self.context = context or BuildContext()
        self.left_whole: list[LeftWhole] = []
        self._loaded: State | None = None
        self._layers: dict[tuple[type[nn.Module], ...], dict[str, nn.Module]] = {}

    @property
    def name(self) -> str:
        """The algorithm's name."""
        return str(self.config.algorithm)

    def layers(self, model: nn.Module, types: tuple[type[nn.Module], ...] = WEIGHTED) -> dict[str, nn.Module]:
        """The layers of ``types`` in the configuration's scopes, by name; found once. See :mod:`.scopes`.

        Raises:
            ValueError: a scope matches no module, or no layer is left.
        """
        if types not in self._layers:
            self._layers[types], left = select_layers(model, self.config, types)
            for each in left:
                self.leave_whole(each.name, each.reason)
        return self._layers[types]

    def leave_whole(self, name: str, reason: str) -> None:
        """Log, and note for the statistics, that something in scope cannot be compressed safely."""
        logger.warning("%s leaves %s whole: %s", self.name, name, reason)
        self.left_whole.append(LeftWhole(name, reason))

    def check(self, model: nn.Module) -> None:
        """Raise what :meth:`apply_to` would, before anything is changed."""

    def apply_to(self, model: nn.Module) -> nn.Module:
        """See :class:`CompressionAlgorithmBuilder`."""
        self._apply_to(model)
        if self.context.initialize and self._loaded is None:
            self._initialize(model)
        return model

    @abstractmethod
    def _apply_to(self, model: nn.Module) -> None:
        """Change the model; after :meth:`load_state`, as the state says."""

    def _initialize(self, model: nn.Module) -> None:
        """Give what was added its first values, from data if need be."""

    @abstractmethod
    def build_controller(self, model: nn.Module) -> BaseCompressionAlgorithmController:
        """See :class:`CompressionAlgorithmBuilder`."""

    def _get_state(self) -> State:
        return {}

    def get_state(self) -> State:
        """See :class:`CompressionAlgorithmBuilder`."""
        return {self.name: check_plain(self._get_state(), f"the state of {self.name}")}

    def load_state(self, state: State) -> None:
        """See :class:`CompressionAlgorithmBuilder`."""
        if self.name in state:
            self._loaded = state[self.name]

    def hand_over(self, controller: BaseCompressionAlgorithmController) -> None:
        """Give the controller the builder's name and state."""
        controller.context = self.context
        controller.left_whole = list(self.left_whole)
        controller.set_builder_state_with_name(self.name, self.get_state()[self.name])

    @property
    def gradient_factor(self) -> float:
        """``compression_lr_multiplier``: the factor on gradients of parameters that the algorithm adds."""
        factor = self.config.compression_lr_multiplier
        return 1.0 if factor is None else float(factor)
