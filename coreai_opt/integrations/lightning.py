"""A callback for Lightning's Trainer."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from coreai_opt.integrations._loop import CompressionLoop, Part

__all__ = ["CompressionCallback"]


class CompressionCallback(Callback):  # type: ignore[misc]
    """Trains with compression: modes, schedules by steps and epochs, and what they reach in the logs.

    Lightning's checkpoints hold the steps of compressors and the states of controllers.

    Args:
        parts: compressors, whose models are prepared, and controllers.
        freeze_in_eval: quantizers observe nothing while Lightning validates.

    Raises:
        TypeError, ValueError: there is no part, or one is neither a compressor nor a controller.
    """

    def __init__(self, *parts: Part, freeze_in_eval: bool = True) -> None:
        self.loop = CompressionLoop(*parts, freeze_in_eval=freeze_in_eval)
        self._begun: int | None = None
        self._done = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enter the training modes."""
        self.loop.begin()
        self._begun, self._done = None, trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell controllers the epoch."""
        self.loop.begin_epoch(trainer.current_epoch)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tell controllers the optimizer step, once for all its batches."""
        if self._begun != trainer.global_step:
            self._begun = trainer.global_step
            self.loop.begin_step(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell compressors that the optimizer has made a step, if it has."""
        if trainer.global_step > self._done:
            self._done = trainer.global_step
            self.loop.end_step()
            pl_module.log_dict(self.loop.figures())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the training modes."""
        self.loop.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the training modes."""
        self.loop.end()

    def state_dict(self) -> dict[str, Any]:
        """Of each part: a compressor's ``state_dict``, a controller's ``get_state``."""
        return self.loop.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state is of other parts.
        """
        self.loop.load_state_dict(state_dict)
