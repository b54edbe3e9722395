"""Ranges of tensors, found from data.

============== =====================================================================================
min_max        least and greatest value of all
mean_min_max   means over the samples of each sample's least and greatest value
mixed_min_max  mean_min_max for asymmetric activations, min_max for everything else
threesigma     median ± 3 · 1.4826 · MAD: 1.4826 times the median absolute deviation of normally distributed
               values is their standard deviation
percentile     percentiles of all values
mean_percentile means over the samples of each sample's percentiles
============== =====================================================================================
"""

import torch
from torch import Tensor

from coreai_opt.controllers.algorithms.quantization_config import RangeInitializer
from coreai_opt.controllers.core.distributed import mean_over_ranks, widest_over_ranks

__all__ = ["ActivationRange", "needs_fixed_range", "weight_range"]

# Values kept of each sample for order statistics. More change the 99.9th percentile less than another batch.
_KEPT_PER_SAMPLE = 16384
_MAD_TO_SIGMA = 1.4826


def needs_fixed_range(initializer: RangeInitializer) -> bool:
    """Whether a weight's range differs from that of its values, which the simulator observes itself."""
    return initializer.type in ("threesigma", "percentile", "mean_percentile")


def weight_range(
    weight: Tensor, channel_axis: int | None, initializer: RangeInitializer
) -> tuple[Tensor, Tensor]:
    """Lower and upper ends of a weight's range, one a channel, or one in all; shape ``(channels,)``."""
    rows = weight.detach().float()
    rows = rows.reshape(1, -1) if channel_axis is None else rows.movedim(channel_axis, 0).flatten(1)
    return _order_statistics(rows, initializer)


def _order_statistics(rows: Tensor, initializer: RangeInitializer) -> tuple[Tensor, Tensor]:
    if initializer.type == "threesigma":
        median = rows.median(dim=1, keepdim=True).values
        deviation = (rows - median).abs().median(dim=1).values * (3 * _MAD_TO_SIGMA)
        return median.squeeze(1) - deviation, median.squeeze(1) + deviation
    if initializer.type in ("percentile", "mean_percentile"):
        # A sort, for torch.quantile takes no more than 2**24 elements. The nearest ranks.
        ordered, last = rows.sort(dim=1).values, rows.shape[1] - 1
        low, high = initializer.params.min_percentile, initializer.params.max_percentile
        return ordered[:, round(last * low / 100)], ordered[:, round(last * high / 100)]
    return rows.amin(dim=1), rows.amax(dim=1)


class ActivationRange:
    """Collects the range of one activation over batches whose first axis counts samples.

    Args:
        initializer: how.
        symmetric: whether the activation is quantized symmetrically.
    """

    def __init__(self, initializer: RangeInitializer, symmetric: bool) -> None:
        kind = initializer.type
        if kind == "mixed_min_max":
            kind = "min_max" if symmetric else "mean_min_max"
        self._initializer = initializer.model_copy(update={"type": kind})
        self._parts: list[tuple[Tensor, ...]] = []

    def observe(self, batch: Tensor) -> None:
        """Take in a batch."""
        rows = batch.detach().float()
        rows = rows.reshape(1, -1) if rows.dim() < 2 else rows.flatten(1)
        kind = self._initializer.type
        if kind in ("threesigma", "percentile"):
            step = -(-rows.shape[1] // _KEPT_PER_SAMPLE)
            self._parts.append((rows[:, ::step].flatten(), rows.amin()))
        else:
            self._parts.append(_order_statistics(rows, self._initializer))

    def result(self) -> tuple[Tensor, Tensor]:
        """The ends of the range: 0-d tensors, the same on all ranks.

        Raises:
            ValueError: nothing was observed.
        """
        if not self._parts:
            raise ValueError("no activation was observed: the layer did not run, or the data loader is empty")
        first, second = (
            torch.cat([each.reshape(-1) for each in part]) for part in zip(*self._parts, strict=True)
        )
        kind = self._initializer.type
        if kind == "min_max":
            return widest_over_ranks(first.amin(), second.amax())
        if kind in ("mean_min_max", "mean_percentile"):
            return mean_over_ranks(first.mean()), mean_over_ranks(second.mean())
        low, high = _order_statistics(first.reshape(1, -1), self._initializer)
        # The three-sigma range lies around the median, and may begin below zero where no value does.
        low = torch.where(second.amin() >= 0, low.clamp(min=0), low)
        return mean_over_ranks(low.squeeze(0)), mean_over_ranks(high.squeeze(0))
