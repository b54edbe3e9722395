"""The compressor that palettizes a model's weights."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from coreai_opt import _prepared_models
from coreai_opt._restoring import training_flags, undone_on_failure
from coreai_opt._sharding.layout import is_sharded, whole
from coreai_opt._utils.writing import replaced
from coreai_opt.base_model_compressor import EagerCompressionComponentBuilderMixin, _BaseModelCompressor
from coreai_opt.common import CompressionType, ExportBackend
from coreai_opt.palettization.config import KMeansPalettizerConfig
from coreai_opt.palettization.kmeans._export import finalize_palettes
from coreai_opt.palettization.kmeans._placed import keep_up_to_date, placed_simulators
from coreai_opt.palettization.kmeans._plan import plan
from coreai_opt.palettization.kmeans._sensitivities import (
    CalibrationHelper,
    load_sensitivities,
    sensitivity_of,
)
from coreai_opt.palettization.kmeans._supported import OP_TYPES, SUPPORTED_MODULES
from coreai_opt.palettization.kmeans.kmeans_fake_palettize import _KMeansFakePalettize

__all__ = ["KMeansPalettizer"]


class KMeansPalettizer(EagerCompressionComponentBuilderMixin, _BaseModelCompressor):
    """Replaces the values of a model's weights by those of small palettes, found by k-means.

    Args:
        model: the model; :meth:`prepare` changes it in place.
        config: what to palettize, and how; None for 4 bits in all supported operations.

    Example:
        >>> palettizer = KMeansPalettizer(model, KMeansPalettizerConfig.presets.w4())
        >>> model = palettizer.prepare(example_inputs)
        >>> with palettizer.training_mode():
        ...     for inputs, labels in data:
        ...         train_step(model, inputs, labels)
        ...         palettizer.step()
        >>> model = palettizer.finalize(backend=ExportBackend.Torch)
    """

    _config_class: ClassVar[type[KMeansPalettizerConfig]] = KMeansPalettizerConfig
    _supported_modules: ClassVar[tuple[type[nn.Module], ...]] = SUPPORTED_MODULES
    _kind = CompressionType.PALETTIZATION
    _op_types: ClassVar[dict[Callable[..., Any], str]] = OP_TYPES
    _simulator_class: ClassVar[type[_KMeansFakePalettize]] = _KMeansFakePalettize

    def __init__(self, model: nn.Module, config: KMeansPalettizerConfig | None = None) -> None:
        super().__init__(model, config)
        self._training_depth = 0
        # The first step that palettizes, by the qualified name of the weight.
        self._start_steps: dict[str, int] = {}

    def prepare(
        self,
        example_inputs: tuple[Any, ...] | Mapping[str, Any],
        sensitivity_path: str | Path | None = None,
        num_workers: int = 1,
        state_dict: Mapping[str, Any] | None = None,
        *,
        progress: bool = True,
    ) -> nn.Module:
        """Cluster the weights that the configuration names, and return the model with palettized weights.

        Weights that their specification does not fit are left as they are, with a warning in the log.

        Args:
            example_inputs: positional arguments for one forward, which shows what reads which weight; or a
                mapping of keyword arguments.
            sensitivity_path: a file of sensitivities, as :meth:`save_sensitivities` writes it.
            num_workers: how many weights are clustered at a time.
            state_dict: the state of a model that was prepared with the same configuration. It is loaded
                strictly, the weights as well, and nothing is clustered.
            progress: show a bar.

        Raises:
            RuntimeError: the model is prepared already, also by a pruner; or a pruned weight cannot be stored
                as vectors; or ``state_dict`` does not fit the prepared model, or lacks palettes.
            TypeError: an argument has the wrong type.
            ValueError: ``num_workers`` is not positive; a weight is not finite; sensitivities are negative,
                not finite, or have another shape than their weight.
            FileNotFoundError: there is no file of sensitivities. After any error the model is as it was.
        """
        self._require_unprepared()
        if _prepared_models.is_prepared(self._model, CompressionType.PRUNING):
            raise RuntimeError(
                "prepare: the model is prepared by a MagnitudePruner. Finalize that first, for "
                "ExportBackend.Torch; specifications with a sparsity_detection_threshold then keep the zeros"
            )
        if not isinstance(num_workers, int):
            raise TypeError(f"num_workers must be an int; got {type(num_workers).__name__}")
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1; got {num_workers}")
        if state_dict is not None and not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping; got {type(state_dict).__name__}")
        sensitivities = None if sensitivity_path is None else load_sensitivities(sensitivity_path)
        with self._given(example_inputs) as args:
            self._left_out = {}
            planned = plan(self._model, self._config, args, state_dict, self._left_out)
        if sensitivities is not None:
            for each in planned:
                shape = each.target.tensor.shape
                each.simulator.sensitivities = sensitivity_of(each.original_name, shape, sensitivities)
        if state_dict is None:
            _cluster_all([(each.simulator, each.target.tensor) for each in planned], num_workers, progress)
        with undone_on_failure(self._model):
            for each in planned:
                self._insert(each.target, each.simulator)
                for module, attribute in each.target.owners:
                    keep_up_to_date(module.parametrizations[attribute])  # type: ignore[index]
            if state_dict is not None:
                self._load_prepared_state_dict(self._model, state_dict)
                for each in planned:
                    each.simulator.enable_fake_palett()
        self._start_steps = {
            each.target.fqn: each.schedule.enable_fake_palettize
            for each in planned
            if each.schedule is not None
        }
        self._mark_prepared(self._model, state_dict)
        return self._model

    @contextmanager
    def calibration_mode(  # type: ignore[override]
        self,
        model: nn.Module | None = None,
        *,
        loss_fn: Callable[..., Tensor],
        sensitivity_path: str | Path | None = None,
    ) -> Iterator[CalibrationHelper]:
        """A context that measures how sensitive the loss is to each weight, and clusters anew at its end.

        Weights are not palettized while it is active. Run forwards, and hand each output to the helper. The
        parameters' ``grad`` holds the sums of squared gradients then, and afterwards what it held before.

        Args:
            model: the prepared model; None for the one of the constructor.
            loss_fn: loss of an output and a target, a scalar.
            sensitivity_path: file to which the sensitivities of all trained parameters are written.

        Yields:
            An object with ``step(output, target)``.

        Raises:
            RuntimeError: the model is not prepared; or, at the end, there was no step.
            ValueError: at the end, a gradient was not finite. The palettes are as they were after any error.
        """
        model = self._require_prepared(model, "calibration_mode")
        simulators = [each.simulator for each in placed_simulators(model)]
        was_on = [simulator.is_on() for simulator in simulators]
        for simulator in simulators:
            simulator.disable_fake_palett()
        helper = CalibrationHelper(model, loss_fn)
        try:
            yield helper
        finally:
            helper.close()
            for simulator, on in zip(simulators, was_on, strict=True):
                simulator.enable_fake_palett(on)
        self._use_sensitivities(model, helper.sensitivities(), sensitivity_path)

    def save_sensitivities(self, path: str | Path) -> None:
        """Write the sensitivities of the palettized weights to a file for :meth:`prepare`.

        Raises:
            RuntimeError: the model is not prepared.
            ValueError: no weight has sensitivities.
        """
        model = self._require_prepared(None, "save_sensitivities")
        found = {
            each.original_name: each.simulator.sensitivities
            for each in placed_simulators(model)
            if each.simulator.sensitivities is not None
        }
        if not found:
            raise ValueError(
                "the model has no sensitivities: run calibration_mode, or give prepare a sensitivity_path"
            )
        with replaced(path) as part:
            torch.save(found, part)

    @contextmanager
    def training_mode(self) -> Iterator["KMeansPalettizer"]:  # type: ignore[override]
        """A context for training; within it, call :meth:`step` after each step of the optimizer.

        The model is in training mode; afterwards each module is in the mode that it was in before.

        Raises:
            RuntimeError: the model is not prepared.
        """
        model = self._require_prepared(None, "training_mode")
        self._apply_schedules(model)
        self._training_depth += 1
        try:
            with training_flags(model, True):
                yield self
        finally:
            self._training_depth -= 1

    def step(self) -> None:
        """Tell that a training step is over: schedules advance, and palettes follow their weights.

        Raises:
            RuntimeError: outside of :meth:`training_mode`.
        """
        if not self._training_depth:
            raise RuntimeError(
                "step() belongs to training: call it within `with palettizer.training_mode():`"
            )
        super().step()
        self._apply_schedules(self._model)
        for each in placed_simulators(self._model):
            if each.simulator.is_on():
                each.simulator.step(each.weight(), self._step_count)

    def finalize(
        self,
        model: nn.Module | None = None,
        backend: ExportBackend = ExportBackend.CoreAI,
        *,
        mmap_dir: str | Path | None = None,
    ) -> nn.Module:
        """End training, and return the model: with dense weights of the palettized values.

        Args:
            model: the prepared model; None for the one of the constructor.
            backend: ``ExportBackend.Torch``; ``ExportBackend.CoreAI``, for which weights are held as indices
                and tables; or ``ExportBackend.CoreML``, for which metadata hold the tables.
            mmap_dir: for Core AI: a folder, empty or not there, to which weights are written, one file each,
                and from which they are mapped into memory. Keep the files as long as the model lives.

        Raises:
            RuntimeError: the model is not prepared, or finalized already.
            ValueError: ``mmap_dir`` is given for another backend, or for a model that is not on the CPU; or
                the backend cannot express a specification.
            NotImplementedError: the backend is not available.
            ImportError: the backend's package is not installed.
            NotADirectoryError, FileExistsError: ``mmap_dir`` is a file, or has files in it.
        """
        model = self._require_prepared(model, "finalize")
        if mmap_dir is not None and backend != ExportBackend.CoreAI:
            raise ValueError(f"mmap_dir is for ExportBackend.CoreAI only; got backend={backend!r}")
        if backend in (ExportBackend.CoreAI, ExportBackend.CoreML):
            finalize_palettes(model, ExportBackend(backend), mmap_dir)
            self._mark_finalized(model)
            return model
        self._require_torch(backend)
        self._finalize_for_torch(model)
        return model

    @classmethod
    def get_op_type_resolver(cls) -> Callable[[Callable[..., Any]], str | None]:
        """A function that names the type of a torch function, None for those without palettized weights."""
        return OP_TYPES.get

    def _uninitialized_compression_modules(self, model: nn.Module) -> list[str]:
        return [
            each.simulator.tensor_fqn
            for each in placed_simulators(model)
            if each.simulator.centroids is None or each.simulator.centroids.numel() == 0
        ]

    def _use_sensitivities(
        self, model: nn.Module, sensitivities: dict[str, Tensor], path: str | Path | None
    ) -> None:
        if path is not None:
            with replaced(path) as part:
                torch.save(sensitivities, part)
        placed = list(placed_simulators(model))
        new = [
            sensitivity_of(each.original_name, each.chain.original.shape, sensitivities) for each in placed
        ]
        for each, sensitivity in zip(placed, new, strict=True):
            each.simulator.sensitivities = sensitivity
        _cluster_all([(each.simulator, each.weight()) for each in placed], num_workers=1)

    def _apply_schedules(self, model: nn.Module) -> None:
        for each in placed_simulators(model):
            simulator = each.simulator
            start = self._start_steps.get(simulator.tensor_fqn)
            if start is None or simulator.is_on() == (self._step_count >= start):
                continue
            simulator.enable_fake_palett(self._step_count >= start, reinitialize=True)
            if simulator.is_on():
                # Here, so that no compiled forward has to cluster.
                simulator.ensure_initialized(each.weight())


def _cluster_all(
    jobs: list[tuple[_KMeansFakePalettize, Tensor]], num_workers: int, progress: bool = True
) -> None:
    """Give each simulator its palettes, ``num_workers`` at a time."""
    title = f"Palettizing layers (num_workers={num_workers})"
    bar = tqdm(total=len(jobs), desc=title, disable=not (jobs and progress))
    if any(is_sharded(weight) for _, weight in jobs):
        with bar:
            for simulator, weight in jobs:  # ranks have to ask for the same one at a time
                simulator.ensure_initialized(whole(weight))
                bar.update()
        return
    with bar, ThreadPoolExecutor(num_workers) as pool:
        for _ in pool.map(lambda job: job[0].ensure_initialized(job[1]), jobs):
            bar.update()
