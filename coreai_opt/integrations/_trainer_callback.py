"""A callback for transformers' Trainer."""

from typing import Any

from torch import Tensor
from torch.fx import GraphModule
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from coreai_opt.controllers.core.api import CompressionAlgorithmController
from coreai_opt.integrations._loop import CompressionLoop, Part

__all__ = ["CompressionCallback"]


def _own_tensors(model: GraphModule, state_dict: Any, prefix: str, local_metadata: Any) -> None:
    """Give each name of a graph's state a tensor of its own.

    A Trainer writes the state of what is no model of transformers as it is, and safetensors refuses tensors
    that several names share: those of simulators that serve several places, and tied weights.
    """
    seen: set[int] = set()
    for name, value in state_dict.items():
        if isinstance(value, Tensor) and value.numel():
            if value.data_ptr() in seen:
                state_dict[name] = value.clone()
            seen.add(value.data_ptr())


class CompressionCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Trains with compression: modes, schedules by steps and epochs, and what they reach in the logs.

    The Trainer's checkpoints hold the steps of compressors and the states of controllers, in
    ``trainer_state.json``. ``train(resume_from_checkpoint=...)`` takes them up, without
    ``restore_callback_states_from_checkpoint``, which cannot make this callback anew.

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
        if not parts:
            raise ValueError(
                "give at least one compressor or controller. (If the Trainer makes the callback anew: leave "
                "restore_callback_states_from_checkpoint at False; the callback takes its state up itself)"
            )
        self.loop = CompressionLoop(*parts, freeze_in_eval=freeze_in_eval)

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into its checkpoints."""
        return {"args": {}, "attributes": self.loop.state_dict()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Enter the training modes, at the steps of the checkpoint that training goes on from.

        Raises:
            ValueError: the Trainer has several of these callbacks, or the checkpoint is of other compressors
                and controllers.
        """
        name = type(self).__name__
        states: Any = state.stateful_callbacks  # a dict, though it is declared as a list
        saved = states.get(name)
        if isinstance(saved, list):
            raise ValueError(f"the Trainer has several {name}s: give all compressors and controllers to one")
        if saved is None:
            # The Trainer asks for an entry as it saves; a checkpoint from elsewhere has none.
            states[name] = self.state()
        elif state.global_step:
            self.loop.load_state_dict(saved["attributes"])
        for each in self.loop.parts:
            model = each.model if isinstance(each, CompressionAlgorithmController) else each._model
            if isinstance(model, GraphModule) and _own_tensors not in model._state_dict_hooks.values():
                model.register_state_dict_post_hook(_own_tensors)
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
