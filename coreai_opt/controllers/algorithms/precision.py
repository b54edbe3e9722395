"""Bits of each layer by the traces of the loss's Hessian, HAWQ-v2 (Dong et al., arXiv 1911.03852).

A layer whose weights the loss is curved in suffers from coarse quantization: its sensitivity to ``b`` bits is
the mean of its Hessian's diagonal times the squared error of its weights in ``b`` bits. The bits are those of
least total sensitivity with which the model has few enough bit operations.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from coreai_opt.base_model_compressor import training_flags
from coreai_opt.controllers.algorithms.quantizers import floating
from coreai_opt.controllers.core.inputs import Batch
from coreai_opt.search.assigning import Option, optimal

__all__ = ["assign_bits", "hessian_traces", "multiplications", "output_errors"]

logger = logging.getLogger(__name__)


def hessian_traces(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    losses: Callable[[], Iterable[Tensor]],
    iterations: int,
    tolerance: float,
) -> dict[str, float]:
    """Mean of the diagonal of the Hessian for each weight, by Hutchinson's estimate.

    ``v H v`` is averaged over vectors of random signs, until the sum over the weights changes by less than
    ``tolerance``, relatively, or there were enough.

    Args:
        model: stays as it is; runs in evaluation mode.
        weights: whose blocks of the Hessian are looked at.
        losses: yields the loss of each batch, with a graph.
        iterations: vectors at most.
        tolerance: when to stop.
    """
    generator = torch.Generator().manual_seed(0)
    needed = {name: weight.requires_grad for name, weight in weights.items()}
    parameters = list(weights.values())
    sums = [0.0] * len(parameters)
    last = 0.0
    done = 0
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with training_flags(model, False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for number in range(1, iterations + 1):
                signs = [_signs(parameter, generator) for parameter in parameters]
                counted, step = 0, [0.0] * len(parameters)
                for loss in losses():
                    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
                    product = sum(
                        (gradient * sign).sum()
                        for gradient, sign in zip(gradients, signs, strict=True)
                        if gradient is not None
                    )
                    curved = torch.autograd.grad(product, parameters, allow_unused=True)  # type: ignore[arg-type]
                    for index, (curve, sign) in enumerate(zip(curved, signs, strict=True)):
                        step[index] += 0.0 if curve is None else float((curve * sign).sum())
                    counted += 1
                sums = [total + each / max(counted, 1) for total, each in zip(sums, step, strict=True)]
                done, mean = number, sum(sums) / number
                if number > 1 and abs(mean - last) <= tolerance * max(abs(last), 1e-12):
                    break
                last = mean
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(needed[name])
    logger.info("the Hessian's traces are means over %d random vectors", done)
    return {
        name: total / done / weight.numel()
        for (name, weight), total in zip(weights.items(), sums, strict=True)
    }


def _signs(parameter: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(2, parameter.shape, generator=generator)
    return (bits * 2 - 1).to(parameter.device, parameter.dtype)


@torch.no_grad()
def output_errors(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    quantized: Callable[[str, int], Tensor],
    bits: Sequence[int],
    batches: Sequence[Batch],
) -> dict[str, dict[int, float]]:
    """Mean squared change of the model's outputs when a single weight is quantized.

    Args:
        model: stays as it is; runs in evaluation mode.
        weights: which are quantized, one after the other.
        quantized: the values of a weight in so many bits.
        bits: the widths that are tried.
        batches: of arguments.
    """
    with training_flags(model, False):
        whole = [floating(model(*args, **kwargs)) for args, kwargs in batches]
        errors: dict[str, dict[int, float]] = {}
        for name, weight in weights.items():
            before = weight.detach().clone()
            errors[name] = {}
            try:
                for each in bits:
                    weight.copy_(quantized(name, each))
                    errors[name][each] = 0.0
                    for (args, kwargs), expected in zip(batches, whole, strict=True):
                        for mine, its in zip(floating(model(*args, **kwargs)), expected, strict=True):
                            errors[name][each] += float((mine - its).float().square().mean())
                    weight.copy_(before)
            finally:
                weight.copy_(before)
    return errors


@torch.no_grad()
def multiplications(
    model: nn.Module, layers: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, int]:
    """Multiplications of each convolution and linear layer in one forward."""
    counted = dict.fromkeys(layers, 0)

    def count(name: str, layer: Any, given: Tensor, output: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            counted[name] += output.numel() * layer.in_features
        elif layer.transposed:
            counted[name] += given.numel() * layer.weight[0].numel()
        else:
            counted[name] += output.numel() * layer.weight[0].numel()

    handles = [
        layer.register_forward_hook(lambda layer, args, out, name=name: count(name, layer, args[0], out))
        for name, layer in layers.items()
    ]
    try:
        with training_flags(model, False):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return counted


def assign_bits(
    sensitivities: Mapping[str, Mapping[int, float]], costs: Mapping[str, int], ratio: float
) -> dict[str, int]:
    """Bits of each layer, weights and inputs alike: those of least summed sensitivity.

    Args:
        sensitivities: of each layer to each number of bits.
        costs: multiplications of each layer.
        ratio: bit operations with 8 bits ÷ those with the chosen ones, at least.

    Raises:
        ValueError: the fewest bits do not reach the ratio.
    """
    options = {
        name: [Option(str(bits), lost, costs[name] * bits**2) for bits, lost in found.items()]
        for name, found in sensitivities.items()
    }
    full = 64 * sum(costs.values())
    chosen = optimal(options, math.floor(full / ratio))
    if chosen is None:
        fewest = sum(min(each.bits for each in choices) for choices in options.values())
        widths = sorted(next(iter(sensitivities.values())), reverse=True)
        raise ValueError(
            f"compression_ratio: {widths} bits reach {full / max(fewest, 1):g}; {ratio:g} is asked for"
        )
    return {name: int(bits) for name, bits in chosen.items() if bits is not None}
