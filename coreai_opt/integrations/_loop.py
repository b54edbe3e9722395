"""A training loop's events, and what compressors and controllers do at each."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from coreai_opt.base_model_compressor import _BaseModelCompressor
from coreai_opt.controllers.core.api import CompressionAlgorithmController
from coreai_opt.palettization import KMeansPalettizer
from coreai_opt.palettization.kmeans._placed import placed_simulators
from coreai_opt.pruning import MagnitudePruner
from coreai_opt.quantization.base_quantizer import _BaseQuantizer

__all__ = ["CompressionLoop", "Part"]

Part = _BaseModelCompressor | CompressionAlgorithmController


class CompressionLoop:
    """Puts compressors and controllers through a training run.

    Args:
        parts: compressors, whose models are prepared, and controllers.
        freeze_in_eval: quantizers observe nothing while the model is in evaluation mode.

    Raises:
        TypeError: a part is neither.
        ValueError: there is none.
    """

    def __init__(self, *parts: Part, freeze_in_eval: bool = True) -> None:
        if not parts:
            raise ValueError("give at least one compressor or controller")
        for each in parts:
            if not isinstance(each, Part):
                raise TypeError(f"a part must be a compressor or a controller; got {type(each).__name__}")
        self.parts = parts
        self._freeze_in_eval = freeze_in_eval
        self._modes = ExitStack()
        self._is_resumed = False

    @property
    def controllers(self) -> list[CompressionAlgorithmController]:
        """The controllers among the parts."""
        return [each for each in self.parts if isinstance(each, CompressionAlgorithmController)]

    def begin(self) -> None:
        """Training begins, or goes on: models enter their training modes.

        Raises:
            RuntimeError: a model is not prepared.
        """
        self.end()
        with ExitStack() as modes:
            for each in self.parts:
                if isinstance(each, _BaseQuantizer):
                    modes.enter_context(each.training_mode(freeze_in_eval=self._freeze_in_eval))
                elif isinstance(each, KMeansPalettizer):
                    modes.enter_context(each.training_mode())
            self._modes = modes.pop_all()

    def begin_epoch(self, epoch: int) -> None:
        """An epoch begins, counted from 0; or goes on, after :meth:`load_state_dict`."""
        for each in self.controllers:
            # Where training goes on within an epoch, the controllers have been told of it.
            if not self._is_resumed or each.scheduler.current_epoch != epoch:
                each.scheduler.epoch_step(epoch)
        self._is_resumed = False

    def begin_step(self, step: int) -> None:
        """An optimizer step begins, counted from 0 over all epochs."""
        for each in self.controllers:
            each.scheduler.step(step)

    def end_step(self) -> None:
        """The optimizer has made a step."""
        for each in self.parts:
            # A quantizer without a schedule counts no steps.
            is_counted = not isinstance(each, _BaseQuantizer) or each._has_schedule()
            if isinstance(each, _BaseModelCompressor) and is_counted:
                each.step()

    def end(self) -> None:
        """Training ends: models leave their training modes."""
        self._modes.close()

    def state_dict(self) -> dict[str, Any]:
        """The class of each part, and its ``state_dict`` or, of a controller, ``get_state``: plain data.

        What simulators and controllers hold in tensors is in the model's own ``state_dict``.
        """
        return {
            "classes": [type(each).__name__ for each in self.parts],
            "parts": [
                each.state_dict() if isinstance(each, _BaseModelCompressor) else each.get_state()
                for each in self.parts
            ],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from the steps and epochs of :meth:`state_dict`. To be called before :meth:`begin`.

        Raises:
            ValueError: the state is of other parts.
        """
        states = state_dict["parts"]
        own = [type(each).__name__ for each in self.parts]
        saved = state_dict.get("classes", own)  # earlier versions saved none
        if len(states) != len(own) or saved != own:
            raise ValueError(
                f"the checkpoint was saved with {', '.join(saved) or 'nothing'} ({len(states)} in all), the "
                f"callback has {', '.join(own)}: give it the same compressors and controllers, in that order"
            )
        for each, state in zip(self.parts, states, strict=True):
            if isinstance(each, _BaseModelCompressor):
                each.load_state_dict(state)
            else:
                each.load_state(state)
        self._is_resumed = True

    def figures(self) -> dict[str, float]:
        """What schedules have reached, by names for loggers: without a pass over weights or a wait."""
        found: dict[str, float] = {}
        for each in self.parts:
            if isinstance(each, MagnitudePruner):
                levels = [(simulator.sparsity, weight.numel()) for simulator, weight in each._masked()]
                total = sum(count for _, count in levels)
                if total:
                    found["compression/sparsity"] = sum(level * count for level, count in levels) / total
            elif isinstance(each, KMeansPalettizer):
                placed = [each.simulator.is_on() for each in placed_simulators(each._model)]
                if placed:
                    found["compression/palettized"] = sum(placed) / len(placed)
            elif isinstance(each, _BaseQuantizer):
                flags = each._flags()
                if flags:
                    found["compression/observing"] = sum(observes for observes, _ in flags) / len(flags)
                    found["compression/quantized"] = sum(simulates for _, simulates in flags) / len(flags)
            elif isinstance(each, CompressionAlgorithmController):
                found[f"compression/{each.name}/rate"] = float(each.compression_rate)
        return found
