"""Statistics of a layer's inputs, gathered batch by batch."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from coreai_kernels.wide import sum_dtype

__all__ = ["Accumulator", "Gram", "Largest", "Mean"]

# Columns of a panel: see Gram.
_PANEL = 512


class Accumulator(ABC):
    """A statistic of inputs ``[groups, positions, columns]``.

    Attributes:
        count: positions seen.
    """

    count: int = 0

    def add(self, columns: Tensor) -> None:
        """Take float32 inputs of shape ``[groups, positions, columns]`` in."""
        if columns.shape[1]:
            self._add(columns)
            self.count += columns.shape[1]

    @abstractmethod
    def _add(self, columns: Tensor) -> None:
        pass

    @abstractmethod
    def is_finite(self) -> bool:
        """Whether no input was NaN or infinite."""


class Gram(Accumulator):
    """The sums ``X^T X`` of products of two columns.

    Attributes:
        sums: float32 of shape ``[groups, columns, columns]``, of which the lower triangles count.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def _add(self, columns: Tensor) -> None:
        groups, _, size = columns.shape
        if self.sums is None:
            self.sums = columns.new_zeros(groups, size, size)
        # The matrix is symmetric: panels of what lies on and below the diagonal are nearly half of it.
        for total, each in zip(self.sums, columns, strict=True):
            for start in range(0, size, _PANEL):
                stop = min(start + _PANEL, size)
                total[start:, start:stop].addmm_(each[:, start:].t(), each[:, start:stop])

    def matrices(self) -> Tensor:
        """The mean of the products, over all positions: both triangles."""
        assert self.sums is not None
        lower = self.sums.tril()
        return (lower + lower.tril(-1).mT) / self.count

    def is_finite(self) -> bool:
        return self.sums is None or bool(self.sums.diagonal(dim1=1, dim2=2).isfinite().all())


class Mean(Accumulator):
    """The mean of each column: sums, float64 where the device has that, of shape ``[groups, columns]``."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def _add(self, columns: Tensor) -> None:
        found = columns.sum(1, dtype=sum_dtype(columns.device))
        self.sums = found if self.sums is None else self.sums + found

    def value(self) -> Tensor:
        """The means."""
        assert self.sums is not None
        return self.sums / self.count

    def is_finite(self) -> bool:
        return self.sums is None or bool(self.sums.isfinite().all())


class Largest(Accumulator):
    """The largest magnitude of each column, ``[groups, columns]``."""

    def __init__(self) -> None:
        self.found: Tensor | None = None

    def _add(self, columns: Tensor) -> None:
        found = columns.abs().amax(1)
        self.found = found if self.found is None else torch.maximum(self.found, found)

    def value(self) -> Tensor:
        """The magnitudes."""
        assert self.found is not None
        return self.found

    def is_finite(self) -> bool:
        return self.found is None or bool(self.found.isfinite().all())
