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
        initializer: how. Batches after its ``num_init_samples`` samples are not observed.
        symmetric: whether the activation is quantized symmetrically.
        channel_axis: axis of the channels that have ranges of their own; None for one range.

    Raises:
        ValueError: channels are to have order statistics of their own.
    """

    def __init__(
        self, initializer: RangeInitializer, symmetric: bool, channel_axis: int | None = None
    ) -> None:
        kind = initializer.type
        if kind == "mixed_min_max":
            kind = "min_max" if symmetric else "mean_min_max"
        if channel_axis is not None and kind not in ("min_max", "mean_min_max"):
            raise ValueError(
                f"ranges of type {kind!r} are for whole activations; with activations.per_channel use "
                f"mixed_min_max, min_max or mean_min_max"
            )
        self._initializer = initializer.model_copy(update={"type": kind})
        self._axis = channel_axis
        self._left = max(initializer.num_init_samples, 1)
        self._parts: list[tuple[Tensor, ...]] = []

    @property
    def is_empty(self) -> bool:
        """Whether nothing was observed."""
        return not self._parts

    def observe(self, batch: Tensor) -> None:
        """Take in a batch, unless there were enough samples."""
        if self._left <= 0:
            return
        batch = batch.detach().float()
        rows = batch.reshape(1, -1) if batch.dim() < 2 else batch.flatten(1)
        self._left -= rows.shape[0]
        kind = self._initializer.type
        if self._axis is not None:
            channels = batch.movedim(self._axis, 1).flatten(2) if batch.dim() > 2 else batch[:, :, None]
            self._parts.append((channels.amin(2), channels.amax(2)))
        elif kind in ("threesigma", "percentile"):
            step = -(-rows.shape[1] // _KEPT_PER_SAMPLE)
            self._parts.append((rows[:, ::step].flatten(), rows.amin()))
        else:
            self._parts.append(_order_statistics(rows, self._initializer))

    def result(self) -> tuple[Tensor, Tensor]:
        """The ends of the range: 0-d tensors, or one value a channel; the same on all ranks.

        Raises:
            ValueError: nothing was observed.
        """
        if not self._parts:
            raise ValueError("no activation was observed: the layer did not run, or the data loader is empty")
        kind = self._initializer.type
        first, second = (
            torch.cat(part) if self._axis is not None else torch.cat([each.reshape(-1) for each in part])
            for part in zip(*self._parts, strict=True)
        )
        if kind == "min_max":
            return widest_over_ranks(first.amin(0), second.amax(0))
        if kind in ("mean_min_max", "mean_percentile"):
            return mean_over_ranks(first.mean(0)), mean_over_ranks(second.mean(0))
        low, high = _order_statistics(first.reshape(1, -1), self._initializer)
        # The three-sigma range lies around the median, and may begin below zero where no value does.
        low = torch.where(second.amin() >= 0, low.clamp(min=0), low)
        return mean_over_ranks(low.squeeze(0)), mean_over_ranks(high.squeeze(0))
