"""A simulator's training step, on whichever package ``import coreai_opt`` finds.

Both contenders run this very file, ours in this process and Apple's in the worker, so both do the same.
"""

import hashlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, make_input

__all__ = ["FORWARD", "TRAINING", "Simulation"]

FORWARD, TRAINING = "forward", "forward+backward"


def _granularity(name: str) -> Any:
    from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity, PerTensorGranularity

    if name == "tensor":
        return PerTensorGranularity()
    if name.startswith("block "):
        return PerBlockGranularity(axis=1, block_size=int(name.removeprefix("block ")))
    return PerChannelGranularity(axis=int(name.removeprefix("channel ")))


class Simulation:
    """A fake quantizer, the tensor it quantizes and the gradient that comes back; observers are on.

    The variant of the case is the parameter calculator: ``static`` makes it a weight's simulator, others an
    activation's.
    """

    def __init__(self, case: Case) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from coreai_opt.config.spec import CompressionTargetTensor
            from coreai_opt.quantization.spec import QuantizationComponentFactory, QuantizationSpec

            spec = QuantizationSpec(
                dtype=case.number_format.spec_dtype,  # type: ignore[arg-type]
                scale_dtype=case.number_format.scale_dtype,  # type: ignore[arg-type]
                granularity=_granularity(case.granularity),
                qparam_calculator_cls=case.variant,  # type: ignore[arg-type]
            )
            targets = CompressionTargetTensor
            target = targets.WEIGHT if case.variant == "static" else targets.ACTIVATION
            self.module: Any = QuantizationComponentFactory.construct(spec, target)
        self.input = make_input(case).requires_grad_()
        self.grad = make_input(case, seed=1)

    def forward(self) -> Tensor:
        return self.module(self.input)  # type: ignore[no-any-return]

    def training_step(self) -> None:
        self.module(self.input).backward(self.grad)
        self.input.grad = None

    def call(self, phase: str) -> Callable[[], object]:
        """What a sample repeats."""
        return self.forward if phase == FORWARD else self.training_step

    def digest(self) -> str:
        """Fingerprint of output and gradient of the first step: contenders must agree on it."""
        output = self.forward()
        output.backward(self.grad)
        gradient, self.input.grad = self.input.grad, None
        assert gradient is not None
        fingerprint = hashlib.blake2b(digest_size=16)
        for tensor in (output.detach(), gradient):
            fingerprint.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return fingerprint.hexdigest()
