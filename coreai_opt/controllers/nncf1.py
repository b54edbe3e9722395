"""The older compression interface, of NNCF 1.x: one object owns model, loss and scheduler.

Its scheduler steps *after* the optimizer step and the epoch, with counters from 0::

    algorithm = CompressionAlgorithm(model, config, input_size=(1, 1, 8, 8))
    algorithm.initialize(loader)
    for epoch in ...:
        for inputs, targets in ...:
            loss = criterion(algorithm.model(inputs), targets) + algorithm.loss()
            ...
            algorithm.scheduler.step()
        algorithm.scheduler.epoch_step()
    algorithm.export_model("model.onnx")

With a configuration as :func:`create_compressed_model` takes it, the algorithms of this package do the work.
A subclass is a method of its own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.controllers.core.api import CompressionAlgorithmController
from coreai_opt.controllers.core.base import BaseCompressionAlgorithmController
from coreai_opt.controllers.core.config import ControllerConfig
from coreai_opt.controllers.core.copies import copy_model
from coreai_opt.controllers.core.create import create_compressed_model, register_default_init_args
from coreai_opt.controllers.core.losses import device_of
from coreai_opt.export.onnx_program import DEFAULT_OPSET, exported, write_program

__all__ = ["CompressionAlgorithm", "CompressionLoss", "CompressionScheduler"]


class CompressionLoss(nn.Module):
    """What a method adds to the loss of the task: nothing, unless a subclass says otherwise.

    Args:
        model: the compressed model; its device is the loss's.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # In a list, so that the model does not become a child, whose parameters would count twice.
        self._target = [model]

    def forward(self) -> Tensor:
        """The loss, a 0-d tensor."""
        return torch.zeros((), device=device_of(self._target[0]))

    def statistics(self) -> dict[str, Any]:
        """The loss's value, under ``loss``. Waits for the device."""
        with torch.no_grad():
            return {"loss": float(self())}


class CompressionScheduler:
    """Counts the steps and epochs that are over; a subclass changes its method along with them."""

    def __init__(self) -> None:
        self.last_step = 0
        self.last_epoch = 0

    def step(self, last: int | None = None) -> None:
        """Call after each optimizer step.

        Args:
            last: how many steps have been made; None for one more than before.
        """
        self.last_step = self.last_step + 1 if last is None else last

    def epoch_step(self, last: int | None = None) -> None:
        """Call after each epoch.

        Args:
            last: how many epochs are over; None for one more than before.
        """
        self.last_epoch = self.last_epoch + 1 if last is None else last

    def state_dict(self) -> dict[str, Any]:
        """The counters."""
        return {"last_step": self.last_step, "last_epoch": self.last_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the counters."""
        self.last_step, self.last_epoch = state["last_step"], state["last_epoch"]


class CompressionAlgorithm:
    """A compression method on a model.

    Made directly, it runs the algorithms that the configuration names, see :class:`ControlledAlgorithm`. A
    subclass is a method of its own, and ``config`` any dict that it understands: it changes the model in its
    constructor or in :meth:`initialize`, and sets ``_loss`` and ``_scheduler`` where it has its own; those of
    this class add nothing and only count.

    Args:
        model: the model to compress.
        config: parameters of the method.
        input_size: shape of the model's input, with the batch; for what needs an example, as export does.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "CompressionAlgorithm":
        """An object of the class; of this class itself, one that runs algorithms by their names."""
        return super().__new__(ControlledAlgorithm if cls is CompressionAlgorithm else cls)

    def __init__(self, model: nn.Module, config: Any = None, input_size: Sequence[int] | None = None) -> None:
        self._model = model
        self.config = config
        self.input_size = None if input_size is None else tuple(input_size)
        self._loss: CompressionLoss = CompressionLoss(model)
        self._scheduler: CompressionScheduler = CompressionScheduler()

    @property
    def model(self) -> nn.Module:
        """The compressed model."""
        return self._model

    @property
    def loss(self) -> CompressionLoss:
        """What to add to the loss of the task."""
        return self._loss

    @property
    def scheduler(self) -> CompressionScheduler:
        """What to step along with the training."""
        return self._scheduler

    def distributed(self) -> None:
        """Prepare the method for several processes. Call it before wrapping the model."""

    def statistics(self) -> dict[str, Any]:
        """Facts about the compressed model: those of the loss."""
        return self.loss.statistics()

    def initialize(self, data_loader: Any) -> None:
        """Set the method's parameters from data.

        Args:
            data_loader: yields batches.
        """

    def prepare_for_export(self, model: nn.Module) -> nn.Module:
        """Remove from ``model``, a copy of the compressed one, what only training needs; return it."""
        return model

    def export_model(self, filename: str | Path) -> None:
        """Write the compressed model to an ONNX file.

        Args:
            filename: where to.

        Raises:
            ValueError: no ``input_size`` was given.
        """
        if self.input_size is None:
            raise ValueError("export_model needs an example of the input: give input_size to the constructor")
        example = torch.ones(self.input_size, device=device_of(self.model))
        lowered = self.prepare_for_export(copy_model(self.model).eval())
        write_program(exported(lowered, (example,), {}, DEFAULT_OPSET), Path(filename))


class _ControllerLoss(CompressionLoss):
    """The loss of a controller."""

    def __init__(self, controller: BaseCompressionAlgorithmController) -> None:
        super().__init__(controller.model)
        self._controller = controller

    def forward(self) -> Tensor:
        """See the base."""
        return self._controller.loss()


class _ControllerScheduler(CompressionScheduler):
    """Steps a controller's scheduler, which wants its steps *before* the optimizer's.

    Making it begins the first epoch and step; every step after that ends one and begins the next.
    """

    def __init__(self, controller: BaseCompressionAlgorithmController) -> None:
        super().__init__()
        self._controller = controller
        controller.scheduler.epoch_step(0)
        controller.scheduler.step(0)

    def step(self, last: int | None = None) -> None:
        """See the base."""
        super().step(last)
        self._controller.scheduler.step(self.last_step)

    def epoch_step(self, last: int | None = None) -> None:
        """See the base."""
        super().epoch_step(last)
        self._controller.scheduler.epoch_step(self.last_epoch)
        # The step that was begun when the last one ended is the new epoch's first.
        self._controller.scheduler.step(self.last_step)


_Parts = tuple[BaseCompressionAlgorithmController, _ControllerLoss, _ControllerScheduler]


class ControlledAlgorithm(CompressionAlgorithm):
    """One or several algorithms of this package, through their controller.

    Args:
        model: the model.
        config: as for :func:`create_compressed_model`.
        input_size: shape of the model's input, with the batch; for algorithms that need an example.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ControllerConfig | Mapping[str, Any] | str | Path,
        input_size: Sequence[int] | None = None,
    ) -> None:
        checked = ControllerConfig.load(config)
        if input_size is not None and not checked.input_info:
            info = {"input_info": {"sample_size": list(input_size)}}
            checked = ControllerConfig.from_dict({**checked.model_dump(exclude_unset=True), **info})
        super().__init__(model, checked, input_size)
        self._parts: _Parts | None = None

    def initialize(self, data_loader: Any) -> None:
        """Build the algorithm into the model, with ranges and statistics from the data.

        Without this call, the first use of the model builds it without data.

        Args:
            data_loader: as for :func:`register_default_init_args`; None for no data.

        Raises:
            RuntimeError: the algorithm is in the model already.
            ValueError: the configuration needs data, and there is none.
        """
        if self._parts is not None:
            raise RuntimeError("initialize: the algorithm is in the model already")
        config = self.config
        if data_loader is not None:
            config = register_default_init_args(config, data_loader)
        controller, _ = create_compressed_model(self._model, config)
        self._parts = controller, _ControllerLoss(controller), _ControllerScheduler(controller)

    def _built(self) -> _Parts:
        if self._parts is None:
            self.initialize(None)
        assert self._parts is not None
        return self._parts

    @property
    def controller(self) -> CompressionAlgorithmController:
        """The controller that does the work."""
        return self._built()[0]

    @property
    def model(self) -> nn.Module:
        """See the base."""
        return self._built()[0].model

    @property
    def loss(self) -> CompressionLoss:
        """See the base."""
        return self._built()[1]

    @property
    def scheduler(self) -> CompressionScheduler:
        """See the base."""
        return self._built()[2]

    def distributed(self) -> None:
        """Make all ranks of the process group start equal. Call it before wrapping the model."""
        self._built()[0].distributed()

    def statistics(self) -> dict[str, Any]:
        """Facts about the compressed model, by algorithm."""
        return self._built()[0].statistics().to_dict()

    def prepare_for_export(self, model: nn.Module) -> nn.Module:
        """Strip ``model``, a copy of the compressed one."""
        self._built()[0].strip_model(model)
        return model

    def export_model(self, filename: str | Path) -> None:
        """See the base. The configuration's ``input_info`` or the data tell the input, too."""
        self._built()[0].export_model(filename)
