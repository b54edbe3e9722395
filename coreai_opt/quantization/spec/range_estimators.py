"""Ranges that leave outliers out: of a share of the elements, of least squared error, of least divergence."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

import coreai_kernels
from coreai_opt.config.spec.factory import CompressionTargetTensor
from coreai_opt.quantization.spec import _numbers
from coreai_opt.quantization.spec.granularity import QuantizationGranularity
from coreai_opt.quantization.spec.range_calculator import RangeCalculatorBase

__all__ = ["EntropyRangeCalculator", "MSERangeCalculator", "PercentileRangeCalculator", "entropy_threshold"]

_WEIGHT = CompressionTargetTensor.WEIGHT


class _BlockwiseRangeCalculator(RangeCalculatorBase):
    """Base of calculators that look at the elements of each block."""

    def _blocks(self, tensor: Tensor) -> Tensor:
        """The elements in float32, one block a row, in the blocks' order."""
        block_size = self.get_block_size(tensor.shape)
        if 0 in block_size:
            raise IndexError(f"the tensor is empty: shape {tuple(tensor.shape)} has no range")
        shape: list[int] = []
        for size, block in zip(tensor.shape, block_size, strict=True):
            shape += [size // block, block]
        axes = list(range(len(shape)))
        split = tensor.detach().float().reshape(shape).permute(axes[::2] + axes[1::2])
        return split.reshape(-1, math.prod(block_size))


@RangeCalculatorBase.register("percentile")
class PercentileRangeCalculator(_BlockwiseRangeCalculator):
    """The range that leaves out the same number of elements at either end. NaN if a block holds one.

    Of ``n`` elements in ascending order, the ends are the elements number ``n - ceil(n p) + 1`` and
    ``ceil(n p)``, with ``p = percentile / 100``: the nearest-rank percentiles.

    Args:
        percentile: in (50, 100]; a field of this name in a specification's subclass sets it.

    Raises:
        ValueError: it is outside.
    """

    def __init__(
        self,
        granularity: QuantizationGranularity,
        quantization_target: CompressionTargetTensor = _WEIGHT,
        percentile: float = 99.99,
        **kwargs: Any,
    ) -> None:
        super().__init__(granularity, quantization_target, **kwargs)
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile must be above 50 and at most 100; got {percentile}")
        self.percentile = percentile

    def _generate_min_max(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        blocks = self._blocks(tensor)
        size = blocks.shape[1]
        # In whole numbers: 99.99 of a hundred is no binary fraction.
        rank = min(size, max(1, -(-size * round(self.percentile * 10**6) // 10**8)))
        low, high = blocks.kthvalue(size - rank + 1, 1).values, blocks.kthvalue(rank, 1).values
        nan = blocks.isnan().any(1)
        return low.masked_fill(nan, torch.nan).to(tensor.dtype), high.masked_fill(nan, torch.nan).to(
            tensor.dtype
        )


@RangeCalculatorBase.register("mse")
class MSERangeCalculator(RangeCalculatorBase):
    """The range with the least squared error of quantization (Nagel et al., arXiv 2106.08295, equation 3.1).

    The range from the smallest to the largest element is shrunk in equal steps; the first with the least
    error is taken, block by block.

    Args:
        steps: how many ranges are tried.
        smallest: the smallest of them, as a share of the whole.
    """

    def __init__(
        self,
        granularity: QuantizationGranularity,
        quantization_target: CompressionTargetTensor = _WEIGHT,
        steps: int = 80,
        smallest: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(granularity, quantization_target, **kwargs)
        if steps < 1 or not 0 < smallest <= 1:
            raise ValueError(
                f"steps must be at least 1 and smallest in (0, 1]; got steps={steps}, smallest={smallest}"
            )
        self.steps = steps
        self.smallest = smallest
        self._spec: Any = None

    def set_spec(self, spec: Any) -> None:
        """See the base."""
        self._spec = spec

    def _generate_min_max(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        spec = self._spec
        if spec is None:
            raise RuntimeError(
                "the mse range depends on how values are quantized: make the calculator from a "
                "QuantizationSpec, or call set_spec(spec) first"
            )
        block_size = self.get_block_size(tensor.shape)
        if 0 in block_size:
            raise IndexError(f"the tensor is empty: shape {tuple(tensor.shape)} has no range")
        x = tensor.detach().float()
        low, high = coreai_kernels.observe_range(x, block_size=block_size)
        low, high = low.clamp(max=0), high.clamp(min=0)
        best_low, best_high = low, high
        least = torch.full_like(low, torch.inf)
        for step in range(self.steps):
            share = 1 - (1 - self.smallest) * step / max(1, self.steps - 1)
            error = self._error(x, low * share, high * share, block_size)
            better = error < least
            least = torch.where(better, error, least)
            best_low = torch.where(better, low * share, best_low)
            best_high = torch.where(better, high * share, best_high)
        return best_low.to(tensor.dtype), best_high.to(tensor.dtype)

    def _error(self, x: Tensor, low: Tensor, high: Tensor, block_size: tuple[int, ...]) -> Tensor:
        spec = self._spec
        fmt = _numbers.format_of(spec.dtype)
        scale, zero_point, _ = coreai_kernels.choose_qparams(
            low,
            high,
            scheme=spec.qscheme.kernel_scheme,
            quant_min=spec.quant_min,
            quant_max=spec.quant_max,
            format=fmt,
            scale_format=_numbers.scale_format_of(spec.scale_dtype),
        )
        rounded = coreai_kernels.fake_quantize(
            x,
            scale,
            zero_point,
            block_size=block_size,
            quant_min=spec.quant_min,
            quant_max=spec.quant_max,
            format=fmt,
        )
        squared = (rounded - x).square_()
        for axis, block in enumerate(block_size):
            if block > 1:
                squared = squared.unflatten(axis, (-1, block)).sum(axis + 1)
        return squared


@RangeCalculatorBase.register("entropy")
class EntropyRangeCalculator(_BlockwiseRangeCalculator):
    """The range around zero whose quantized values tell most about the values.

    Migacz, "8-bit Inference with TensorRT", GTC 2017: see :func:`entropy_threshold`. Made for activations
    with one range for the tensor: blocks are worked through one by one. Where all values are of one sign, the
    range ends at the value nearest to zero on the other side.

    Args:
        bins: of the histogram of magnitudes.
        levels: quantized magnitudes.
        stride: from one number of bins that is tried to the next.
    """

    def __init__(
        self,
        granularity: QuantizationGranularity,
        quantization_target: CompressionTargetTensor = _WEIGHT,
        bins: int = 2048,
        levels: int = 128,
        stride: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(granularity, quantization_target, **kwargs)
        if not 1 < levels <= bins or stride < 1:
            raise ValueError(
                f"levels must be at least 2 and at most bins, stride at least 1; got levels={levels}, "
                f"bins={bins}, stride={stride}"
            )
        self.stride = stride
        self.bins = bins
        self.levels = levels

    def _generate_min_max(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        blocks = self._blocks(tensor)
        found = [self._threshold(block) for block in blocks.abs()]
        high = torch.tensor(found, device=tensor.device, dtype=torch.float32)
        low, top = blocks.amin(1), blocks.amax(1)
        # Not beyond what there is: a side without values gets no range.
        return torch.maximum(-high, low).to(tensor.dtype), torch.minimum(high, top).to(tensor.dtype)

    def _threshold(self, magnitudes: Tensor) -> float:
        largest = float(magnitudes.max())
        if not np.isfinite(largest) or largest == 0:
            return largest
        counts = torch.histc(magnitudes, self.bins, 0, largest).cpu().double().numpy()
        return entropy_threshold(counts, self.levels, self.stride) * largest / self.bins


def entropy_threshold(counts: Any, levels: int, stride: int = 1) -> int:
    """How many bins of a histogram to keep, so that ``levels`` merged bins diverge least from it.

    For each number ``i`` of bins kept, ``P`` is their counts with all beyond added to the last, and ``Q``
    the counts without those, merged into ``levels`` runs and spread evenly over the run's bins that are not
    empty; the ``i`` with the least Kullback-Leibler divergence ``sum P log(P / Q)`` is returned.

    Args:
        counts: float64 array of the histogram of magnitudes, from zero on.
        levels: number of runs.
        stride: try every so many numbers of bins, all of them included.
    """
    best, least = len(counts), np.inf
    for kept in range(len(counts), levels - 1, -stride):
        inside = counts[:kept]
        p = inside.copy()
        p[-1] += counts[kept:].sum()
        starts = np.arange(levels) * kept // levels
        filled = np.add.reduceat((inside > 0).astype(np.float64), starts)
        shares = np.divide(np.add.reduceat(inside, starts), filled, out=np.zeros(levels), where=filled > 0)
        q = np.repeat(shares, np.diff(np.append(starts, kept))) * (inside > 0)
        if q.sum() == 0 or np.any((q == 0) & (p > 0)):
            continue
        p, q = p / p.sum(), q / q.sum()
        used = p > 0
        divergence = float((p[used] * np.log(p[used] / q[used])).sum())
        if divergence < least:
            best, least = kept, divergence
    return best
