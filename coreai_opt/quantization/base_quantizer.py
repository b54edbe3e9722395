"""What quantizers share: modes of a prepared model, and the schedule of training."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

from torch import nn

from coreai_opt._restoring import training_flags
from coreai_opt.base_model_compressor import _BaseModelCompressor
from coreai_opt.common import CompressionType
from coreai_opt.quantization._eager.preparation import set_flags, simulators_of
from coreai_opt.quantization._ranges import reduce_ranges
from coreai_opt.quantization.config import ModuleQuantizerConfig, QATSchedule, QuantizerConfig
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["_BaseQuantizer"]


class _BaseQuantizer(_BaseModelCompressor):
    """Base of the quantizers: switches simulators on and off."""

    _config_class: ClassVar[type[QuantizerConfig]] = QuantizerConfig
    _config: QuantizerConfig
    _kind = CompressionType.QUANTIZATION
    _simulator_class = FakeQuantizeImplBase

    def __init__(self, model: nn.Module, config: QuantizerConfig | None = None) -> None:
        super().__init__(model, config)
        self._trained: nn.Module | None = None

    @property
    def _stepping_model(self) -> nn.Module:
        return self._model if self._trained is None else self._trained

    def _uninitialized_compression_modules(self, model: nn.Module) -> list[str]:
        found = []
        for name, module in model.named_modules():
            if isinstance(module, FakeQuantizeImplBase):
                scale = getattr(module.qparams_calculator, "scale", None)
                if scale is not None and scale.numel() == 0:
                    found.append(name)
        return found

    @contextmanager
    def calibration_mode(
        self, model: nn.Module | None = None, *, sync_ranges: bool = False
    ) -> Iterator[None]:
        """A context in which forwards collect the ranges of activations.

        The model is in evaluation mode; activations are observed and not simulated, weights both. Afterwards
        nothing is observed, all is simulated, and modules are in training mode as they were.

        Args:
            model: a copy of the prepared model; None for the quantizer's own.
            sync_ranges: at the end, :meth:`sync_ranges`.

        Raises:
            RuntimeError: the model is not prepared; or there is no process group to synchronize with.
        """
        model = self._require_prepared(model, "calibration_mode")
        try:
            with self._leaving_simulation_on(model), training_flags(model, False):
                set_flags(simulators_of(model), observe=True, simulate=False, simulate_weights=True)
                yield
                if sync_ranges:
                    self.sync_ranges(model)
        finally:
            if self._trained is not None:
                # Within training_mode(), which goes on.
                self._apply_schedule(self._trained)

    @contextmanager
    def training_mode(
        self, model: nn.Module | None = None, *, freeze_in_eval: bool = False, sync_ranges: bool = False
    ) -> Iterator[None]:
        """A context in which the model is trained with quantization.

        The model is in training mode; all is observed and simulated, or what the ``qat_schedule`` of the
        configuration says for the step at hand. Afterwards as for :meth:`calibration_mode`.

        Args:
            model: a copy of the prepared model; None for the quantizer's own.
            freeze_in_eval: observe nothing in forwards of the model while it is in evaluation mode. Without
                it, data for validation take part in the ranges.
            sync_ranges: at the end, :meth:`sync_ranges`.

        Raises:
            RuntimeError: the model is not prepared, or is being trained already.
        """
        model = self._require_prepared(model, "training_mode")
        if self._trained is not None:
            raise RuntimeError("training_mode() is active already, and cannot be entered twice")
        with self._leaving_simulation_on(model), training_flags(model, True):
            self._trained = model
            try:
                self._apply_schedule(model)
                with self._frozen_in_eval(model) if freeze_in_eval else nullcontext():
                    yield
                if sync_ranges:
                    self.sync_ranges(model)
            finally:
                self._trained = None

    def sync_ranges(self, model: nn.Module | None = None) -> None:
        """Give activations the same ranges in all processes of a distributed training, which see other data.

        To be called by all of them. Of moving averages the mean is taken, of global ranges the widest;
        calculators without a running range stay.

        Args:
            model: a copy of the prepared model; None for the quantizer's own.

        Raises:
            RuntimeError: the model is not prepared, or there is no process group.
        """
        reduce_ranges(simulators_of(self._require_prepared(model, "sync_ranges")))

    @contextmanager
    def _frozen_in_eval(self, model: nn.Module) -> Iterator[None]:
        was_training = model.training

        def switch(module: nn.Module, args: Any) -> None:
            nonlocal was_training
            if module.training == was_training:
                return
            was_training = module.training
            if was_training:
                self._apply_schedule(module)
            else:
                for simulator in simulators_of(module):
                    simulator.disable_observer()

        handle = model.register_forward_pre_hook(switch)
        try:
            yield
        finally:
            handle.remove()

    def _flags(self) -> list[tuple[bool, bool]]:
        """Of each simulator, whether it observes and whether it simulates."""
        flags = [each._current_flags() for each in simulators_of(self._stepping_model)]
        return [(each.observe, each.fake_quant) for each in flags]

    def step(self) -> None:
        """Tell the quantizer that a training step is over: the schedule goes on.

        Warns (UserWarning) if there is none.

        Raises:
            RuntimeError: training_mode() is not active.
        """
        if self._trained is None:
            raise RuntimeError(
                "step() counts training steps: call it inside of `with quantizer.training_mode():`"
            )
        if not self._has_schedule():
            warnings.warn(
                "step() has no effect: no module's configuration has a qat_schedule",
                UserWarning,
                stacklevel=2,
            )
        super().step()
        self._apply_schedule(self._trained, changes_only=True)

    def _set_steps(self, steps: int) -> None:
        super()._set_steps(steps)
        if self._trained is not None:
            self._apply_schedule(self._trained)

    @staticmethod
    @contextmanager
    def _leaving_simulation_on(model: nn.Module) -> Iterator[None]:
        try:
            yield
        finally:
            set_flags(simulators_of(model), observe=False, simulate=True)

    def _apply_schedule(self, model: nn.Module, changes_only: bool = False) -> None:
        if changes_only and not self._schedule_changes():
            return
        scheduled = self._schedules(model) if self._has_schedule() else {}
        for simulator in simulators_of(model):
            schedule = scheduled.get(simulator)
            observes, simulates = (True, True) if schedule is None else schedule.flags_at(self._step_count)
            set_flags((simulator,), observe=observes, simulate=simulates)

    def _module_configs(self) -> list[ModuleQuantizerConfig]:
        config = self._config
        entries = (*config.module_type_configs.values(), *config.module_name_configs.values())
        return [each for each in (config.global_config, *entries) if each is not None]

    def _has_schedule(self) -> bool:
        return any(each.qat_schedule is not None for each in self._module_configs())

    def _require_no_schedule(self) -> None:
        if self._has_schedule():
            raise RuntimeError(
                "quantizers follow the qat_schedule of the configuration: they cannot be switched by hand"
            )

    def _schedule_changes(self) -> bool:
        """Whether a schedule switches something at this step."""
        schedules = (each.qat_schedule for each in self._module_configs())
        return any(
            schedule is not None
            and self._step_count
            in (schedule.enable_observer, schedule.enable_fake_quant, schedule.disable_observer)
            for schedule in schedules
        )

    def _schedules(self, model: nn.Module) -> Mapping[FakeQuantizeImplBase, QATSchedule | None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of patterns without a match: prepare gave them
            levels = self._config.build_module_config_dict(model)
        configs = {name: config for level in levels.values() for name, config in level.items()}
        found: dict[FakeQuantizeImplBase, QATSchedule | None] = {}
        for name, module in model.named_modules():
            if isinstance(module, FakeQuantizeImplBase):
                owner = name.rpartition(".parametrizations.")[0] if "parametrizations" in name else None
                if owner is None:
                    owner = name.rpartition(".")[0]
                owner = owner if module.configured_by is None else module.configured_by
                found[module] = configs[owner].qat_schedule if owner in configs else None
        return found

    def enable_observer(self, module: nn.Module | None = None) -> None:
        """Let the simulators in ``module`` observe; None for the whole model.

        Raises:
            ValueError: ``module`` is not part of the model.
            RuntimeError: the configuration has a ``qat_schedule``, which switches them.
        """
        for simulator in self._simulators_in(module):
            simulator.enable_observer()

    def disable_observer(self, module: nn.Module | None = None) -> None:
        """Let the simulators in ``module`` not observe. See :meth:`enable_observer`."""
        for simulator in self._simulators_in(module):
            simulator.disable_observer()

    def enable_fake_quant(self, module: nn.Module | None = None) -> None:
        """Let the simulators in ``module`` simulate. See :meth:`enable_observer`."""
        for simulator in self._simulators_in(module):
            simulator.enable_fake_quant()

    def disable_fake_quant(self, module: nn.Module | None = None) -> None:
        """Let the simulators in ``module`` pass tensors on unchanged. See :meth:`enable_observer`."""
        for simulator in self._simulators_in(module):
            simulator.disable_fake_quant()

    def _simulators_in(self, module: Any) -> Iterator[FakeQuantizeImplBase]:
        self._require_no_schedule()
        if module is None:
            return simulators_of(self._model)
        if not any(module is each for each in self._model.modules()):
            raise ValueError(
                f"module must be the quantizer's model or a part of it; got a {type(module).__name__} from "
                f"elsewhere"
            )
        return simulators_of(module)
