"""Masks and schedules, through public names: values that must be the same in any package."""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "SCHEDULES",
    "channel_masks",
    "compute_mask",
    "kept_by_sparsity",
    "masks",
    "random_channel_masks",
    "schedule_values",
    "ties",
]

SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"begin_step": 0},
    "constant later": {"begin_step": 100},
    "cubic": {"total_iters": 900},
    "linear": {"total_iters": 900, "power": 1},
    "odd": {"total_iters": 777, "power": 0.37, "begin_step": 13, "initial_sparsity": 0.1},
    "downward": {"total_iters": 500, "power": 2.5, "initial_sparsity": 0.95},
    "every 7th": {"total_iters": 900, "update_frequency": 7},
    "every 100th": {"total_iters": 901, "update_frequency": 100, "begin_step": 3, "initial_sparsity": 0.2},
    "never between": {"total_iters": 50, "update_frequency": 400},
    "at once": {"total_iters": 1},
}


def schedule(name: str) -> Any:
    from coreai_opt.pruning import config

    fields = SCHEDULES[name]
    constant = name.startswith("constant")
    return (config.ConstantSparsitySchedule if constant else config.PolynomialDecaySchedule)(**fields)


def schedule_values(name: str) -> tuple[str, ...]:
    """The sparsity of 1,000 steps toward two targets, to the last bit."""
    found: list[str] = []
    chosen = schedule(name)
    for target in (0.75, 0.9):
        found += [float(chosen.compute_sparsity(step, target)).hex() for step in range(1000)]
    return tuple(found)


def compute_mask(weight: Tensor, sparsity: float, axis: int | None = None) -> Tensor:
    from coreai_opt.pruning.spec import ChannelStructured, PruneImplBase, Unstructured

    scheme = Unstructured() if axis is None else ChannelStructured(axis=axis)
    return PruneImplBase.get_class("default").compute_mask(weight, sparsity, scheme)


def kept_by_sparsity() -> tuple[int, ...]:
    """How many elements and channels stay: the rounding of the count."""
    draw = random.Random(0)
    sparsities = [step / 100 for step in range(101)] + [draw.random() for _ in range(100)]
    found = []
    for sparsity, size in itertools.product(sparsities, (1, 3, 7, 10, 100, 997)):
        weight = torch.arange(1.0, size + 1)
        found.append(int(compute_mask(weight, sparsity).sum()))
        found.append(int(compute_mask(weight[:, None].repeat(1, 2), sparsity, 0)[:, 0].sum()))
    return tuple(found)


def distinct(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values with magnitudes of their own, so that no tie can be at a threshold."""
    count = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(count)
    order = torch.randperm(count, generator=generator)
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    # Neighbours of 16-bit floats: their bit patterns count up.
    if dtype in (torch.bfloat16, torch.float16):
        magnitudes = (torch.arange(count, dtype=torch.int16) + 0x3000).view(dtype)
    else:
        magnitudes = (torch.arange(count) + 1).to(dtype) / 7
    return (magnitudes[order] * signs.to(dtype)).reshape(shape)


def masks(dtype: torch.dtype) -> Iterator[Tensor]:
    for shape in ((64,), (12, 17), (8, 3, 5, 5), (1,), ()):
        for sparsity in (0.0, 0.3, 0.5, 0.75, 0.99, 1.0):
            yield compute_mask(distinct(*shape, dtype=dtype), sparsity)


def channel_masks(axis: int) -> Iterator[Tensor]:
    for shape in ((12, 17), (8, 3, 5, 5)):
        for sparsity in (0.0, 0.3, 0.5, 0.75, 0.99, 1.0):
            # The result is an expanded tensor there: only its values count.
            yield compute_mask(distinct(*shape), sparsity, axis).clone()


def random_channel_masks(axis: int) -> Iterator[Tensor]:
    """Of normally distributed weights, wherever the two norms about the threshold are not nearly equal."""
    for seed, shape in enumerate(((64, 300), (300, 64), (40, 24, 3, 3), (8, 3, 50, 7))):
        generator = torch.Generator().manual_seed(seed)
        scales = torch.exp2(4 * torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator))
        weight = torch.randn(shape, generator=generator) * scales
        others = [i for i in range(weight.dim()) if i != axis % weight.dim()]
        norms = weight.double().abs().sum(others).sort().values
        for pruned in range(1, len(norms)):
            if norms[pruned] > norms[pruned - 1] * (1 + 1e-5):
                yield compute_mask(weight, (pruned + 0.5) / len(norms), axis).clone()


def ties(dtype: torch.dtype) -> tuple[tuple[int, float], ...]:
    """With ties at the threshold: how many stay, and the least magnitude of those."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for levels, sparsity in itertools.product((1, 2, 5, 17), (0.1, 0.5, 0.77, 0.9)):
        weight = torch.randint(-levels, levels + 1, (31, 33), generator=generator).to(dtype)
        mask = compute_mask(weight, sparsity)
        found.append((int(mask.sum()), float(weight.abs()[mask.bool()].min())))
    return tuple(found)
