"""A callback for transformers' Trainer."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from coreai_opt.integrations._loop import CompressionLoop, Part

__all__ = ["CompressionCallback"]


class CompressionCallback(TrainerCallback):  # type: ignore[misc]
    """Trains with compression: modes, schedules by steps and epochs, and what they reach in the logs.

    Args:
        parts: compressors, whose models are prepared, and controllers.
        freeze_in_eval: quantizers observe nothing while the Trainer evaluates.

    Raises:
        TypeError, ValueError: there is no part, or one is neither a compressor nor a controller.

    Example:
        >>> model, quantizer = coreai_opt.quantize(model, batch, "w8a8")
        >>> callback = CompressionCallback(quantizer)
        >>> trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    """

    def __init__(self, *parts: Part, freeze_in_eval: bool = True) -> None:
        self.loop = CompressionLoop(*parts, freeze_in_eval=freeze_in_eval)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Enter the training modes."""
        self.loop.begin()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell controllers the epoch."""
        self.loop.begin_epoch(int(state.epoch or 0))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell controllers the optimizer step."""
        self.loop.begin_step(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell compressors that the optimizer has made a step."""
        self.loop.end_step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add what schedules have reached to the logs, and to those that the Trainer keeps."""
        found = self.loop.figures()
        if logs is not None:
            logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the training modes."""
        self.loop.end()
