"""GPTQ: columns of a weight are rounded one after another, and the rest makes up for the errors."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

import coreai_kernels
from coreai_opt.quantization.post_training._accumulators import Gram
from coreai_opt.quantization.post_training._layers import Columns, Layer
from coreai_opt.quantization.post_training._stages import Granularity
from coreai_opt.quantization.post_training.algorithm import PostTrainingAlgorithm, Task

__all__ = ["GPTQ", "inverse_factor"]

Tables = tuple[Tensor, Tensor | None, Tensor | None]

# Triangles up to this size are inverted as a whole.
_SMALL = 256


@PostTrainingAlgorithm.register("gptq")
class GPTQ(PostTrainingAlgorithm):
    """Second-order rounding of weights (Frantar et al., arXiv 2210.17323).

    Minimises ``||W X - Q X||^2`` of each layer, with the inputs ``X`` that the quantized layers before it
    give: columns are rounded in order, and each error is spread over the columns that are still to come, by
    the Cholesky factor of the inverse of ``H = X X^T + damping * mean(diag(X X^T)) * I``.

    Fields:
        act_order: round the columns with the largest inputs first. Groups of columns get their scales from
            the weight before the first rounding then; else from what the weight is when their turn comes.
        damping: share of the mean of the diagonal that is added to it, above 0.
        block_size: columns that are rounded before their errors reach the rest, 1 to 256. The result does
            not depend on it but for the order of additions.
        sequential: ``"block"``: all layers of a block of the model are measured at once, and see each other
            unquantized; ``"layer"``: one after another, for one more forward each and less memory.
    """

    act_order: bool = True
    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01
    block_size: Annotated[int, Field(ge=1, le=256)] = 128
    sequential: Granularity = "block"

    def run(self, task: Task) -> None:
        """See the base.

        Raises:
            ValueError: the Hessian of a layer is singular, or inputs are not finite.
        """
        for stage in task.stages("GPTQ", task.layers, Gram, granularity=self.sequential):
            hessians = stage.statistic.matrices()
            orders = self._orders(hessians)
            factors = [self._factor(stage.layers[0], *each) for each in zip(hessians, orders, strict=True)]
            stage.statistic.sums = None
            for layer in stage.layers:
                self._solve(Columns(layer), factors, orders)

    def _orders(self, hessians: Tensor) -> list[Tensor | None]:
        if not self.act_order:
            return [None] * len(hessians)
        return [each.diagonal().argsort(descending=True, stable=True) for each in hessians]

    def _factor(self, layer: Layer, hessian: Tensor, order: Tensor | None) -> Tensor:
        hessian = hessian.clone() if order is None else hessian[order][:, order]
        diagonal = hessian.diagonal()
        # Inputs that are always zero say nothing: their columns are rounded to nearest.
        dead = diagonal == 0
        diagonal.add_(self.damping * diagonal.mean())
        diagonal[dead] = 1.0
        factor = inverse_factor(hessian)
        if factor is None:
            raise ValueError(
                f"{layer.name}: the Hessian of its {len(hessian)} inputs is singular with damping="
                f"{self.damping}; use more damping, such as 0.1, or more calibration data"
            )
        return factor

    def _solve(self, columns: Columns, factors: list[Tensor], orders: list[Tensor | None]) -> None:
        matrix = columns.matrix()
        is_static = self.act_order or not columns.are_independent or len(factors) > 1
        tables = columns.tables(matrix) if is_static else None
        parts = []
        rows = columns.rows // len(factors)
        for index, (factor, order) in enumerate(zip(factors, orders, strict=True)):
            part = slice(index * rows, (index + 1) * rows)
            own = None if tables is None else _rows_of(tables, part)
            parts.append(self._solve_part(columns, matrix[part], factor, order, own))
        matrix = torch.cat([each for each, _ in parts])
        columns.write(matrix, parts[0][1] if tables is None else tables)

    def _solve_part(
        self, columns: Columns, matrix: Tensor, factor: Tensor, order: Tensor | None, tables: Tables | None
    ) -> tuple[Tensor, Tables]:
        """The weight before its rounding, and the parameters of its groups."""
        size, width = columns.columns, columns.width
        values = (matrix if order is None else matrix[:, order]).t().contiguous()
        places = torch.arange(size) if order is None else order.cpu()
        groups = (places // width).tolist()
        found: list[Tables] = []
        for start, stop in self._blocks(size, width, tables is not None):
            # Within a block, a group that chooses its parameters has to wait for the errors before it.
            step = stop - start if tables is not None else min(width, stop - start)
            errors = values.new_empty(stop - start, values.shape[1])
            for begin in range(start, stop, step):
                end = begin + step
                if tables is None and begin % width == 0:
                    found.append(columns.tables(values[begin : begin + width].t()))
                own, first = (tables, 0) if tables is not None else (found[-1], groups[begin])
                values[begin:end], errors[begin - start : end - start] = self._columns(
                    columns, values[begin:end], factor[begin:end, begin:end], own, groups[begin:end], first
                )
                values[end:stop].addmm_(
                    factor[begin:end, end:stop].t(), errors[begin - start : end - start], alpha=-1
                )
            values[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
        result = values.t()
        if order is not None:
            result = torch.empty_like(matrix).index_copy_(1, order, result)
        return result, _together(found) if tables is None else tables

    def _blocks(self, size: int, width: int, is_static: bool) -> list[tuple[int, int]]:
        """Begins and ends of blocks: they hold whole groups, or whole blocks make up a group."""
        block = self.block_size
        if not is_static and width <= block:
            block = block // width * width
        period = size if is_static or width <= block else width
        return [
            (start, min(start + block, outer + period))
            for outer in range(0, size, period)
            for start in range(outer, outer + period, block)
        ]

    @staticmethod
    def _columns(
        columns: Columns, values: Tensor, factor: Tensor, tables: Tables, groups: list[int], first: int
    ) -> tuple[Tensor, Tensor]:
        _, fmt, quant_min, quant_max = columns.plan.values
        scale, zero_point, minval = tables
        return coreai_kernels.gptq_columns(
            values,
            factor.t().contiguous(),
            scale,
            zero_point,
            minval,
            groups=[each - first for each in groups],
            format=fmt,
            quant_min=quant_min,
            quant_max=quant_max,
        )


def _rows_of(tables: Tables, rows: slice) -> Tables:
    scale, zero_point, minval = (None if each is None else each[:, rows].contiguous() for each in tables)
    assert scale is not None
    return scale, zero_point, minval


def _together(found: list[Tables]) -> Tables:
    scale, zero_point, minval = (
        None if each[0] is None else torch.cat([one for one in each if one is not None])
        for each in zip(*found, strict=True)
    )
    assert scale is not None
    return scale, zero_point, minval


def inverse_factor(matrix: Tensor) -> Tensor | None:
    """The upper triangle ``U`` with ``U^T U`` the inverse of a symmetric positive definite matrix.

    Of the matrix with rows and columns in the opposite order, ``L L^T``; the inverse of ``L`` in the opposite
    order is ``U``. That takes two thirds of the usual way by way of the inverse, and loses less.

    Args:
        matrix: float32 or float64 of shape ``[n, n]``.

    Returns:
        The same shape; None if the matrix is not positive definite.
    """
    lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if info.item() != 0:
        return None
    _invert_lower_(lower)
    return lower.flip(0, 1) if bool(lower.diagonal().isfinite().all()) else None


def _invert_lower_(triangle: Tensor) -> None:
    """Invert a lower triangle in place."""
    size = len(triangle)
    if size <= _SMALL:
        identity = torch.eye(size, dtype=triangle.dtype, device=triangle.device)
        triangle.copy_(torch.linalg.solve_triangular(triangle, identity, upper=False))
        return
    half = size // 2
    first, last, between = triangle[:half, :half], triangle[half:, half:], triangle[half:, :half]
    _invert_lower_(first)
    _invert_lower_(last)
    between.copy_((last @ between) @ first).neg_()
