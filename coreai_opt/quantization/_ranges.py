"""Ranges of activations that several processes have observed, made one."""

from collections.abc import Iterable

import torch
import torch.distributed as dist

from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase
from coreai_opt.quantization.spec.qparams_calculator import (
    GlobalMinMaxQParamsCalculator,
    RunningRangeMixin,
)

__all__ = ["reduce_ranges"]


@torch.no_grad()
def reduce_ranges(simulators: Iterable[FakeQuantizeImplBase]) -> None:
    """Give the running ranges of all ranks one value: the widest of global ranges, the mean of averages.

    Args:
        simulators: the same ones, in the same order, on each rank. Those that keep no running range stay.

    Raises:
        RuntimeError: there is no process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("sync_ranges needs a process group: call torch.distributed.init_process_group")
    calculators = [each.qparams_calculator for each in simulators]
    ranged = [
        each for each in calculators if isinstance(each, RunningRangeMixin) and each.running_min.numel()
    ]
    for is_global in (False, True):
        found = [each for each in ranged if isinstance(each, GlobalMinMaxQParamsCalculator) == is_global]
        if not found:
            continue
        low, high = (
            torch.cat([getattr(each, name).float().flatten() for each in found])
            for name in ("running_min", "running_max")
        )
        if is_global:
            dist.all_reduce(low, dist.ReduceOp.MIN)
            dist.all_reduce(high, dist.ReduceOp.MAX)
        else:
            for ends in (low, high):
                dist.all_reduce(ends)
                ends /= dist.get_world_size()
        sizes = [each.running_min.numel() for each in found]
        for each, lowest, highest in zip(found, low.split(sizes), high.split(sizes), strict=True):
            shape = each.running_min.shape
            each.set_running_range(lowest.reshape(shape), highest.reshape(shape))
