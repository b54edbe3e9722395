"""What the compressors of models share: their arguments, their states, and the insertion of simulators."""

import json
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from coreai_opt import _prepared_models
from coreai_opt._call_inputs import Arguments, example_arguments, keywords_added
from coreai_opt._environment import check_state_version, state_versions
from coreai_opt._input_outlines import outline_of
from coreai_opt._restoring import training_flags
from coreai_opt._sharding.layout import is_fully_sharded, refuse
from coreai_opt._state_tensors import (
    StateTarget,
    check_model,
    configured_targets,
    put_on_owners,
    record_state_uses,
)
from coreai_opt._summary import (
    SWITCHED_OFF,
    UNSPECIFIED,
    CompressionSummary,
    summary_of,
    warn_of_unmatched,
)
from coreai_opt._utils.config_utils import plain_data, qualified_name
from coreai_opt.common import CompressionType, ExportBackend
from coreai_opt.config.compression_config import CompressionConfig
from coreai_opt.config.spec import CompressionSimulatorBase
from coreai_opt.export.torch import fold

__all__ = [
    "EagerCompressionComponentBuilderMixin",
    "_BaseModelCompressor",
    "backend_of",
    "original_of",
    "require_mapping",
    "training_flags",
]

logger = logging.getLogger(__name__)


def backend_of(given: Any, argument: str = "backend") -> ExportBackend:
    """The backend that ``given`` is or names; ValueError if there is none."""
    try:
        return ExportBackend(given)
    except ValueError:
        known = ", ".join(str(each) for each in ExportBackend.__members__.values())
        raise ValueError(f"{argument} must be one of {known}; got {given!r}") from None


def require_mapping(state_dict: Any) -> None:
    """TypeError unless it is a mapping."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict must be a mapping, as state_dict() returns it; got {type(state_dict).__name__}"
        )


def _as_json(data: Any) -> Any:
    return json.loads(json.dumps(data))


class _BaseModelCompressor(ABC):
    """Base of the compressors, which change a model in place.

    A subclass names its configuration's class in ``_config_class``, the modules that it compresses in
    ``_supported_modules``, its kind of compression in ``_kind`` and its simulators' class in
    ``_simulator_class``.

    Args:
        model: is changed by :meth:`prepare` and :meth:`finalize`.
        config: what to compress, and how. None for the default of the configuration's class.

    Raises:
        TypeError: ``model`` is no module, or ``config`` no configuration of this compressor.
    """

    _config_class: ClassVar[type[CompressionConfig[Any]]]
    _supported_modules: ClassVar[tuple[type[nn.Module], ...]]
    _kind: ClassVar[CompressionType]
    _simulator_class: ClassVar[type[CompressionSimulatorBase]]

    def __init__(self, model: nn.Module, config: CompressionConfig[Any] | None = None) -> None:
        check_model(model)
        if config is None:
            config = self._config_class()
        if not isinstance(config, self._config_class):
            raise TypeError(f"config must be a {self._config_class.__name__}, got {type(config).__name__}")
        self._model = model
        # In graph mode, what is prepared is another.
        self._original = model
        self._config: Any = config
        # Whether another compressor prepares the model after this one, with a state that is for both.
        self._is_followed = False
        self._outline: dict[str, Any] | None = None
        # Why parameters that have a specification are not compressed, by name.
        self._left_out: dict[str, str] = {}

    @classmethod
    def supported_modules(cls) -> tuple[type[nn.Module], ...]:
        """Types of modules whose parameters are compressed."""
        return cls._supported_modules

    @abstractmethod
    def prepare(self, example_inputs: tuple[Any, ...] | Mapping[str, Any]) -> nn.Module:
        """Insert simulators into the model, and return it.

        Args:
            example_inputs: positional arguments for one forward; or a mapping of keyword arguments.
        """

    @contextmanager
    def _given(self, example_inputs: Any) -> Iterator[Any]:
        """A context in which the model gets what cannot be given by position; yields what can.

        Args:
            example_inputs: as for :meth:`prepare`; or arguments that were read already.

        Raises:
            TypeError: ``forward`` does not take the keywords.
        """
        arguments = self._arguments(example_inputs)
        with self._explaining(arguments), keywords_added(self._model, arguments.kwargs):
            yield arguments.args

    @staticmethod
    @contextmanager
    def _explaining(arguments: Arguments) -> Iterator[None]:
        """A context in which errors say what a mapping among the arguments may have been meant for."""
        try:
            yield
        except Exception as error:
            if len(arguments.args) == 1 and isinstance(arguments.args[0], Mapping):
                error.add_note(
                    "example_inputs is a tuple with one mapping, which forward gets as it is. For keyword "
                    "arguments, give the mapping itself"
                )
            raise

    def _arguments(self, example_inputs: Any) -> Arguments:
        """Example inputs as arguments, of which what can be given by position is.

        Raises:
            TypeError: ``forward`` does not take them.
        """
        if not isinstance(example_inputs, Arguments):
            example_inputs = example_arguments(self._model, example_inputs)
        self._outline = outline_of(example_inputs)
        return example_inputs

    def _preparation_options(self) -> dict[str, Any]:
        """Arguments beside the configuration and the inputs, that the same preparation needs again."""
        return {}

    @abstractmethod
    def finalize(
        self, model: nn.Module | None = None, backend: ExportBackend = ExportBackend.CoreAI
    ) -> nn.Module:
        """Turn the simulation into the compressed model, and return it."""

    def step(self) -> None:
        """Tell the compressor that a training step is over.

        Raises:
            RuntimeError: the model is not prepared.
        """
        _prepared_models.count_step(self._require_prepared(self._stepping_model, "step"), self._kind)

    @property
    def _stepping_model(self) -> nn.Module:
        """The model whose steps count."""
        return self._model

    @property
    def _step_count(self) -> int:
        """Training steps done; 0 where the model is not prepared."""
        return _prepared_models.steps_of(self._stepping_model, self._kind)

    def state_dict(self) -> dict[str, Any]:
        """What this compressor needs besides the model's own ``state_dict`` to go on: plain data.

        Returns:
            ``{"step_count": steps done, "config": the configuration, "versions": what it was made with}``.
        """
        return {
            "step_count": self._step_count,
            "config": self._plain_config(),
            "versions": state_versions(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from the step of :meth:`state_dict`.

        Warns (UserWarning) if that was made with another configuration.

        Raises:
            RuntimeError: the model is not prepared.
            TypeError: ``state_dict`` is no mapping.
            ValueError: there is no step, or one that is no number of steps; a later version made it, or
                another kind of compressor.
        """
        require_mapping(state_dict)
        check_state_version(state_dict.get("versions", {}), "state_dict")
        self._require_prepared(self._stepping_model, "load_state_dict")
        steps = state_dict.get("step_count")
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ValueError(f"state_dict['step_count'] must be a number of steps, 0 or more; got {steps!r}")
        config = state_dict.get("config")
        if isinstance(config, Mapping) and self._config._CONFIG_KEY not in config:
            raise ValueError(
                f"state_dict is of another compressor than a {type(self).__name__}: its configuration is "
                f"under {next(iter(config), None)!r}, not {self._config._CONFIG_KEY!r}"
            )
        # As JSON, which some checkpoints are and where all keys are strings.
        if config is not None and _as_json(config) != _as_json(self._plain_config()):
            warnings.warn(
                f"the state_dict was saved by a {type(self).__name__} with another configuration",
                UserWarning,
                stacklevel=2,
            )
        self._set_steps(steps)

    def _plain_config(self) -> Any:
        return plain_data(self._config.to_dict(), unregistered=qualified_name)

    def _set_steps(self, steps: int) -> None:
        _prepared_models.set_steps(self._stepping_model, self._kind, steps)

    def calibration_mode(self, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> Any:
        """A context in which forwards of the model collect statistics."""
        raise NotImplementedError(f"{type(self).__name__} uses no calibration data")

    def training_mode(self, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> Any:
        """A context in which the model is trained with compression."""
        raise NotImplementedError(
            f"{type(self).__name__} has no training mode: train the prepared model as it is"
        )

    @classmethod
    def _is_prepared(cls, model: nn.Module) -> bool:
        """Whether a compressor of this kind has prepared ``model`` and not finalized it."""
        return _prepared_models.is_prepared(model, cls._kind)

    def _require_unprepared(self) -> None:
        if self._is_prepared(self._model):
            raise RuntimeError(
                f"prepare: the model is prepared already, by a {type(self).__name__}; "
                f"it can be prepared again once it is finalized"
            )
        for name, module in self._model.named_modules():
            if is_fully_sharded(module):
                raise RuntimeError(
                    f"prepare: {name or 'the model'!r} is sharded by fully_shard, which exchanges its "
                    f"parameters in each forward. Prepare the model first, and shard the prepared one."
                )
            if "_orig_mod" in module._modules:  # torch's OptimizedModule, whose import takes long
                raise RuntimeError(
                    f"prepare: {name or 'the model'!r} is the result of torch.compile, which hides the "
                    f"module's operations and names. Prepare the module that was compiled (its _orig_mod), "
                    f"and compile the prepared one."
                )
            if module._compiled_call_impl is not None:
                raise RuntimeError(
                    f"prepare: {name or 'the model'!r} is compiled in place, which hides its operations. "
                    f"Call compile() on the prepared model."
                )

    @abstractmethod
    def _uninitialized_compression_modules(self, model: nn.Module) -> list[str]:
        """Names of the simulators in ``model`` that do not have the state that they need."""

    def _load_prepared_state_dict(self, model: nn.Module, state_dict: Mapping[str, Any]) -> None:
        """Load the state of a model that was prepared with the same configuration.

        Raises:
            RuntimeError: names or shapes differ, or a simulator is left without state. The model's own
                parameters and buffers are as before then; its simulators are to be removed.
            TypeError: ``state_dict`` is no mapping.
        """
        if self._is_followed:
            _prepared_models.load_simulators(model, state_dict, self._simulator_class)
            return
        _prepared_models.load_prepared(model, state_dict, self._uninitialized_compression_modules)

    def _mark_prepared(self, model: nn.Module, state_dict: Mapping[str, Any] | None = None) -> None:
        """Say that ``model`` is prepared; the steps done are those of ``state_dict``, or none.

        To be called at the end of every prepare. The log tells what is compressed.
        """
        preparation = _prepared_models.Preparation(
            self._config.model_copy(deep=True), self._outline, self._preparation_options()
        )
        _prepared_models.mark_prepared(model, self._kind, preparation, state_dict)
        warn_of_unmatched(self._original, self._config, self._known_op_types())
        summary = self._summary_of(model)
        if summary.is_empty:
            logger.warning(
                f"{summary.compressor}: nothing was compressed. The configuration gives no tensor that the "
                f"example inputs reach a specification, or none that fits it."
            )
        logger.info(summary.line)

    def _known_op_types(self) -> Iterable[str] | None:
        """The types of operations that are compressed; None where the configuration was checked already."""
        return None

    def _summary_of(self, model: nn.Module) -> CompressionSummary:
        disabled = self._config._disabled()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of patterns without a match: prepare gave them
            levels = self._config.build_module_config_dict(self._original)
        entries = {name: entry for level in levels.values() for name, entry in level.items()}

        def why(name: str) -> str:
            if name in self._left_out:
                return self._left_out[name]
            is_off = entries.get(name.rpartition(".")[0]) == disabled
            return SWITCHED_OFF if is_off else UNSPECIFIED

        return summary_of(model, self._simulator_class, type(self).__name__, why)

    def summary(self) -> CompressionSummary:
        """Which parameters are compressed, in how many bits, and why others are not: prints as a table.

        Raises:
            RuntimeError: the model is not prepared.
        """
        return self._summary_of(self._require_prepared(None, "summary"))

    def __repr__(self) -> str:
        if not self._is_prepared(self._model):
            return f"<{type(self).__name__} of a {type(self._model).__name__} that is not prepared>"
        return f"<{self._summary_of(self._model).line}>"

    def _mark_finalized(self, model: nn.Module) -> None:
        """Say that this compressor is done with ``model``. To be called at the end of every finalize."""
        _prepared_models.mark_finalized(model, self._kind)

    def _finalize_for_torch(self, model: nn.Module) -> None:
        """Turn compressed weights into dense ones; what compresses activations stays."""
        fold(model, self._simulator_class)
        self._mark_finalized(model)

    def _require_prepared(self, model: nn.Module | None, action: str) -> nn.Module:
        """``model``, or the compressor's own for None; RuntimeError unless it is prepared."""
        chosen = self._model if model is None else model
        if not isinstance(chosen, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(chosen).__name__}")
        if not self._is_prepared(chosen):
            raise RuntimeError(f"{action}: the model is not prepared. Call prepare(example_inputs) first")
        if action == "finalize":
            refuse(chosen, action)
        return chosen

    @staticmethod
    def _require_torch(backend: ExportBackend) -> None:
        """ValueError unless ``backend`` is one; NotImplementedError unless it is torch."""
        chosen = backend_of(backend)
        if chosen is not ExportBackend.Torch:
            raise NotImplementedError(
                f"this package does not write {chosen.name} models. Use "
                f"finalize(backend=ExportBackend.Torch) for a torch model; or load the prepared model's "
                f"state_dict in Apple's coreai-opt, and finalize there."
            )


class EagerCompressionComponentBuilderMixin:
    """Of compressors that put simulators on parameters, as torch parametrizations."""

    _model: nn.Module
    _config: Any
    # torch functions whose parameters are compressed, and how configurations name their types.
    _op_types: ClassVar[dict[Callable[..., Any], str]]
    _simulator_class: ClassVar[type[CompressionSimulatorBase]]

    def _known_op_types(self) -> Iterable[str]:
        return self._op_types.values()

    def _find_targets(self, example_inputs: Sequence[Any]) -> list[StateTarget]:
        """What to compress, seen in one forward of ``example_inputs`` that leaves no trace."""
        uses = record_state_uses(self._model, example_inputs, self._op_types)
        return configured_targets(self._model, self._config, uses)

    @staticmethod
    def _insert(target: StateTarget, simulator: CompressionSimulatorBase) -> None:
        """Put ``simulator`` on the tensor; on all owners of a shared one."""
        simulator.tensor_fqn = target.fqn
        put_on_owners(simulator, target.owners)

    @classmethod
    def _inserted(cls, model: nn.Module) -> Iterator[tuple[nn.Module, str, CompressionSimulatorBase]]:
        """Each module and attribute that has a simulator, and that simulator."""
        for module in model.modules():
            if parametrize.is_parametrized(module):
                for attribute, chain in _parametrizations(module):
                    for simulator in chain:
                        if isinstance(simulator, cls._simulator_class):
                            yield module, attribute, simulator


def original_of(module: nn.Module, attribute: str) -> Tensor:
    """The tensor behind a parametrized attribute."""
    return getattr(module.parametrizations, attribute).original  # type: ignore[no-any-return]


def _parametrizations(module: nn.Module) -> Iterable[tuple[str, Any]]:
    return module.parametrizations.items()  # type: ignore[operator, union-attr, return-value]
