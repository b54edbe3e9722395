"""The older compression interface of NNCF 1.x, over the controllers.

One object owns model, loss and scheduler, and is made before any data is there; its scheduler steps *after*
the optimizer step and the epoch, with counters from 0::

    algorithm = CompressionAlgorithm(model, config, input_size=(1, 1, 8, 8))
    algorithm.initialize(loader)
    for epoch in ...:
        for inputs, targets in ...:
            loss = criterion(algorithm.model(inputs), targets) + algorithm.loss()
            ...
            algorithm.scheduler.step()
        algorithm.scheduler.epoch_step()
    algorithm.export_model("model.onnx")
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coreai_opt.controllers import api
from coreai_opt.controllers.base import BaseCompressionAlgorithmController
from coreai_opt.controllers.config import ControllerConfig
from coreai_opt.controllers.create import create_compressed_model, register_default_init_args

__all__ = ["CompressionAlgorithm", "CompressionLoss", "CompressionScheduler"]


class CompressionLoss(nn.Module):
    """What compression adds to the loss of the task.

    Args:
        controller: of the compressed model.
    """

    def __init__(self, controller: BaseCompressionAlgorithmController) -> None:
        super().__init__()
        self._controller = controller

    def forward(self) -> Tensor:
        """The loss, a 0-d tensor."""
        return self._controller.loss()

    def statistics(self) -> dict[str, Any]:
        """The last value, under ``loss``. Waits for the device."""
        return {"loss": float(self._controller.loss().detach())}


class CompressionScheduler:
    """Steps after the optimizer.

    Making it begins the first epoch and step of the controller's own scheduler; every step after that ends
    one and begins the next.

    Args:
        controller: of the compressed model.
    """

    def __init__(self, controller: BaseCompressionAlgorithmController) -> None:
        self._controller = controller
        self.last_step = 0
        self.last_epoch = 0
        controller.scheduler.epoch_step(0)
        controller.scheduler.step(0)

    def step(self, last: int | None = None) -> None:
        """Call after each optimizer step.

        Args:
            last: how many steps have been made; None for one more than before.
        """
        self.last_step = self.last_step + 1 if last is None else last
        self._controller.scheduler.step(self.last_step)

    def epoch_step(self, last: int | None = None) -> None:
        """Call after each epoch.

        Args:
            last: how many epochs are over; None for one more than before.
        """
        self.last_epoch = self.last_epoch + 1 if last is None else last
        self._controller.scheduler.epoch_step(self.last_epoch)
        # The step that was begun when the last one ended is the new epoch's first.
        self._controller.scheduler.step(self.last_step)

    def state_dict(self) -> dict[str, Any]:
        """The counters."""
        return {"last_step": self.last_step, "last_epoch": self.last_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the counters; the controller's own state is loaded through the controller."""
        self.last_step, self.last_epoch = state["last_step"], state["last_epoch"]


_Parts = tuple[BaseCompressionAlgorithmController, CompressionLoss, CompressionScheduler]


class CompressionAlgorithm:
    """A compression algorithm, or several, on a model.

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
        self._config = ControllerConfig.load(config)
        if input_size is not None and not self._config.input_info:
            info = {"input_info": {"sample_size": list(input_size)}}
            self._config = ControllerConfig.from_dict({**self._config.model_dump(exclude_unset=True), **info})
        self._model = model
        self._parts: (
            tuple[BaseCompressionAlgorithmController, CompressionLoss, CompressionScheduler] | None
        ) = None

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
        config = self._config
        if data_loader is not None:
            config = register_default_init_args(config, data_loader)
        controller, _ = create_compressed_model(self._model, config)
        self._parts = controller, CompressionLoss(controller), CompressionScheduler(controller)

    def _built(self) -> _Parts:
        if self._parts is None:
            self.initialize(None)
        assert self._parts is not None
        return self._parts

    @property
    def controller(self) -> api.CompressionAlgorithmController:
        """The controller that does the work."""
        return self._built()[0]

    @property
    def model(self) -> nn.Module:
        """The compressed model."""
        return self._built()[0].model

    @property
    def loss(self) -> CompressionLoss:
        """What to add to the loss of the task."""
        return self._built()[1]

    @property
    def scheduler(self) -> CompressionScheduler:
        """What to step along with the training."""
        return self._built()[2]

    def distributed(self) -> None:
        """Make all ranks of the process group start equal. Call it before wrapping the model."""
        self._built()[0].distributed()

    def statistics(self) -> dict[str, Any]:
        """Facts about the compressed model, by algorithm."""
        return self._built()[0].statistics().to_dict()

    def export_model(self, filename: str | Path) -> None:
        """Write the compressed model to an ONNX file."""
        self._built()[0].export_model(filename)
