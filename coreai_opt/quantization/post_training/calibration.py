"""The quantizer's part that runs post-training algorithms and calibrates activations."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coreai_opt._call_inputs import Arguments, read_inputs
from coreai_opt._restoring import training_flags
from coreai_opt.quantization.post_training.algorithm import PostTrainingAlgorithm, run_algorithms
from coreai_opt.quantization.post_training.observation import observe_activations

__all__ = ["CalibrationMixin"]


class CalibrationMixin:
    """Adds ``calibrate`` to a quantizer of whole models."""

    _model: nn.Module
    _require_prepared: Any

    def calibrate(
        self,
        inputs: Any = None,
        algorithm: "str | PostTrainingAlgorithm | Sequence[str | PostTrainingAlgorithm] | None" = None,
        *,
        input_fn: Callable[[Any], Any] | None = None,
        num_batches: int = 128,
        state_path: str | Path | None = None,
    ) -> Mapping[str, str]:
        """Run post-training algorithms on the prepared model, and calibrate its activations on the same data.

        Afterwards simulators are on and observe nothing, as after :meth:`prepare`. Where an
        algorithm has chosen the parameters of a weight's quantization (``gptq``, ``adaround``), calibration
        and training keep them. See docs/post-training.md.

        Args:
            inputs: as for :func:`coreai_opt.quantize`; None for algorithms that need no data, if no
                activations are to be calibrated.
            algorithm: the key of one, such as ``"gptq"``; one with its settings, such as
                ``GPTQ(act_order=False)``; several, which run one after another; None to calibrate
                activations only.
            input_fn: takes a batch and returns what one forward takes.
            num_batches: batches that are read at most.
            state_path: a folder in which finished layers are kept: a call with the same model, data and
                algorithms that was ended goes on from there.

        Returns:
            Names of quantized weights that the last algorithm left as they were, with the reason.

        Raises:
            RuntimeError: the model is not prepared.
            ValueError: there is no such algorithm, no data where it is needed, no layer to work on; or an
                algorithm cannot go on, with the layer's name. Layers before that one stay changed then.
            TypeError: an argument has the wrong type.
        """
        model = self._require_prepared(None, "calibrate")
        if not isinstance(num_batches, int) or isinstance(num_batches, bool) or num_batches < 1:
            raise ValueError(f"num_batches must be an int of at least 1; got {num_batches!r}")
        batches: list[Arguments] = []
        if inputs is not None:
            found = read_inputs(model, inputs, input_fn)
            batches = [found.example] if found.batches is None else list(islice(found.batches, num_batches))
        return self._run_algorithms(algorithm, batches, state_path)

    def _run_algorithms(
        self, algorithm: Any, batches: Sequence[Arguments], state_path: str | Path | None
    ) -> Mapping[str, str]:
        model = self._model
        algorithms = PostTrainingAlgorithm.list_of(algorithm)
        for each in algorithms:
            if each.needs_data and not batches:
                raise ValueError(f"inputs: {type(each).__name__} needs calibration data; got None")
        left_out = run_algorithms(model, algorithms, batches, state_path)
        if batches:
            with training_flags(model, False), torch.no_grad():
                observe_activations(model, batches, anew=bool(algorithms))
        return left_out
