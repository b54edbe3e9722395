"""What the compressors of models share: their arguments, their states, and the insertion of simulators."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from coreai_opt._state_tensors import StateTarget, configured_targets, record_state_uses
from coreai_opt.common import ExportBackend
from coreai_opt.config.compression_config import CompressionConfig
from coreai_opt.config.spec import CompressionSimulatorBase

__all__ = [
    "PREPARED_BY_QUANTIZER",
    "EagerCompressionComponentBuilderMixin",
    "_BaseModelCompressor",
    "original_of",
    "remove_first",
    "training_flags",
]

# The attribute of a model that says so.
PREPARED_BY_QUANTIZER = "_coreai_opt_prepared"


@contextmanager
def training_flags(model: nn.Module, training: bool) -> Iterator[None]:
    """``model.train(training)`` while it is active; afterwards each module is as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in before:
            module.training = flag


class _BaseModelCompressor(ABC):
    """Base of the compressors, which change a model in place.

    A subclass names its configuration's class in ``_config_class`` and the modules that it compresses in
    ``_supported_modules``.

    Args:
        model: is changed by :meth:`prepare` and :meth:`finalize`.
        config: what to compress, and how. None for the default of the configuration's class.

    Raises:
        TypeError: ``model`` is no module, or ``config`` no configuration of this compressor.
    """

    _config_class: ClassVar[type[CompressionConfig[Any]]]
    _supported_modules: ClassVar[tuple[type[nn.Module], ...]]

    def __init__(self, model: nn.Module, config: CompressionConfig[Any] | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if config is None:
            config = self._config_class()
        if not isinstance(config, self._config_class):
            raise TypeError(f"config must be a {self._config_class.__name__}, got {type(config).__name__}")
        self._model = model
        self._config: Any = config
        self._step_count = 0

    @classmethod
    def supported_modules(cls) -> tuple[type[nn.Module], ...]:
        """Types of modules whose parameters are compressed."""
        return cls._supported_modules

    @abstractmethod
    def prepare(self, example_inputs: tuple[Any, ...]) -> nn.Module:
        """Insert simulators into the model, and return it.

        Args:
            example_inputs: positional arguments for one forward.
        """

    @abstractmethod
    def finalize(
        self, model: nn.Module | None = None, backend: ExportBackend = ExportBackend.CoreAI
    ) -> nn.Module:
        """Turn the simulation into the compressed model, and return it."""

    def step(self) -> None:
        """Tell the compressor that a training step is over."""
        self._step_count += 1

    def calibration_mode(self, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> Any:
        """A context in which forwards of the model collect statistics."""
        raise NotImplementedError(f"{type(self).__name__} uses no calibration data")

    def training_mode(self, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> Any:
        """A context in which the model is trained with compression."""
        raise NotImplementedError(
            f"{type(self).__name__} has no training mode: train the prepared model as it is"
        )

    @classmethod
    @abstractmethod
    def _is_prepared(cls, model: nn.Module) -> bool:
        """Whether simulators of this kind are in ``model``."""

    def _require_unprepared(self) -> None:
        if self._is_prepared(self._model):
            raise RuntimeError(
                f"{type(self).__name__}: the model is prepared already; a model can be prepared once"
            )

    def _require_prepared(self, model: nn.Module | None, action: str) -> nn.Module:
        """``model``, or the compressor's own for None; RuntimeError unless it is prepared."""
        chosen = self._model if model is None else model
        if not isinstance(chosen, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(chosen).__name__}")
        if not self._is_prepared(chosen):
            raise RuntimeError(f"{action}: the model is not prepared. Call prepare(example_inputs) first")
        return chosen

    @staticmethod
    def _require_torch(backend: ExportBackend) -> None:
        """ValueError unless ``backend`` is one; NotImplementedError unless it is torch."""
        try:
            chosen = ExportBackend(backend)
        except ValueError:
            known = ", ".join(str(each) for each in ExportBackend.__members__.values())
            raise ValueError(f"backend must be one of {known}; got {backend!r}") from None
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

    @classmethod
    def _is_prepared(cls, model: nn.Module) -> bool:
        return any(isinstance(module, cls._simulator_class) for module in model.modules())

    def _find_targets(self, example_inputs: Sequence[Any]) -> list[StateTarget]:
        """What to compress, seen in one forward of ``example_inputs`` that leaves no trace."""
        uses = record_state_uses(self._model, example_inputs, self._op_types)
        return configured_targets(self._model, self._config, uses)

    @staticmethod
    def _insert(target: StateTarget, simulator: CompressionSimulatorBase) -> None:
        """Put ``simulator`` on the tensor; on all places of a shared one."""
        simulator.tensor_fqn = target.fqn
        for module, attribute in target.places:
            parametrize.register_parametrization(module, attribute, simulator, unsafe=True)

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


def remove_first(module: nn.Module, attribute: str) -> None:
    """Take the first parametrization off an attribute, and leave its result in the tensor."""
    chain: Any = getattr(module.parametrizations, attribute)
    if len(chain) == 1:
        _give_own_class(module)
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
        return
    with torch.no_grad():
        chain.original.set_(chain[0](chain.original))
    del chain[0]


def _give_own_class(module: nn.Module) -> None:
    """Let ``module`` share its class with no other.

    torch makes a class for each parametrized module, which its copies share, and takes the attribute off that
    class when a parametrization goes: off all copies.
    """
    shared = type(module)
    members = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, members)


def _parametrizations(module: nn.Module) -> Iterable[tuple[str, Any]]:
    return module.parametrizations.items()  # type: ignore[operator, union-attr, return-value]
