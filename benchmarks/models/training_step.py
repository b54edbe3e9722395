"""A model's training step, quantized or not, on whichever package ``import coreai_opt`` finds.

Both contenders run this very file, ours in this process and Apple's in the worker, so both do the same.
"""

import hashlib
import logging
import time
import warnings
from dataclasses import replace
from typing import Any

import torch

from benchmarks.models.zoo import build
from benchmarks.timing import seconds_per_call

__all__ = ["COMPILED", "CONFIGS", "EAGER", "FLOAT", "GRAPH", "INT4", "MODES", "TrainingStep"]

FLOAT, INT8, INT4 = "float", "int8", "int4 weights"
CONFIGS = (INT8, INT4)
EAGER, GRAPH, COMPILED = "eager", "graph", "compiled graph"
MODES = (EAGER, GRAPH, COMPILED)
_DIGESTED_STEPS = 3


class TrainingStep:
    """Forward, backward and optimizer, always on the same batch.

    Args:
        model: a name out of `benchmarks.models.zoo`.
        config: ``float``; ``int8``, the default config, which quantizes inputs, outputs and weights; or
            ``int4 weights``, in blocks of 32.
        mode: ``eager``, ``graph``, or ``compiled graph``: what graph mode prepared, through
            :func:`torch.compile`. The float step is that of the model itself in each case.
    """

    def __init__(self, model: str, config: str, mode: str = EAGER) -> None:
        self._task = build(model, large=True)
        self._batch = self._task.draw(torch.Generator().manual_seed(0))
        self.simulators = 0
        if config != FLOAT:
            quantizer, prepared = _prepare(self._task.model, self._batch[0], config, mode)
            # For as long as this object lives: the benchmark trains, and does nothing else.
            self._mode = quantizer.training_mode()
            self._mode.__enter__()
            self.simulators = len(_simulators(prepared))
            chosen: Any = torch.compile(prepared) if mode == COMPILED else prepared
            self._task = replace(self._task, model=chosen)
        # Without a state: the optimizer's own time stays small, and the same for all.
        self._optimizer = torch.optim.SGD(self._task.model.parameters(), lr=1e-3)

    def __call__(self) -> torch.Tensor:
        """Take a step; the loss before it."""
        loss = self._task.batch_loss(self._batch)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss

    def seconds(self, calls: int, cpu_time: bool) -> float:
        """Mean time of ``calls`` steps in a row: elapsed, or what the process used of the processors."""
        clock = time.process_time if cpu_time else time.perf_counter
        return seconds_per_call(self, calls, untimed_call=False, clock=clock)

    def digest(self) -> str:
        """Fingerprint of the losses of the next steps: contenders must agree on it."""
        torch.manual_seed(0)
        losses = torch.stack([self().detach() for _ in range(_DIGESTED_STEPS)])
        return hashlib.blake2b(losses.numpy().tobytes(), digest_size=16).hexdigest()


def _prepare(
    model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], config: str, mode: str
) -> tuple[Any, torch.nn.Module]:
    from torch import nn

    from coreai_opt.quantization import Quantizer, QuantizerConfig

    execution_mode: Any = EAGER if mode == EAGER else GRAPH
    # Blocks of 32 fit not every weight, which is said of each.
    logging.getLogger("coreai_opt").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if config == INT8:
            chosen = QuantizerConfig(execution_mode=execution_mode)
        else:
            chosen = QuantizerConfig.presets.w4_per_block(
                block_size=32, axis=None, execution_mode=execution_mode
            )
            chosen = chosen.only_for(nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)
        quantizer = Quantizer(model, chosen)
        prepared = quantizer.prepare(inputs)
    return quantizer, prepared


def _simulators(model: torch.nn.Module) -> list[torch.nn.Module]:
    from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

    return [module for module in model.modules() if isinstance(module, FakeQuantizeImplBase)]
