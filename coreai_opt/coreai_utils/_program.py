"""Finds the weights of a Core AI program, and puts compressed ones in their place."""

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from coreai._compiler._mlir_libs._coreaiIR._bindings import compiler
from coreai._compiler.dialects import coreai as dialect
from coreai._compiler.ir import (
    DenseElementsAttr,
    DenseResourceElementsAttr,
    FloatAttr,
    FloatType,
    InsertionPoint,
    IntegerAttr,
    IntegerType,
    RankedTensorType,
)
from coreai.authoring import AIProgram
from torch import Tensor

import coreai_kernels

__all__ = ["Builder", "Unsuitable", "Weight", "check_threshold", "compress"]

logger = logging.getLogger(__name__)

# Operations whose constant operand is a weight.
_MATMULS = ("coreai.batch_matmul", "coreai.decomposable.broadcasting_batch_matmul")
_TRANSPOSE = "coreai.transpose"
_USERS = (*_MATMULS, "coreai.conv2d", "coreai.gather_nd", _TRANSPOSE)
# Constants of this size are weights whatever reads them.
_HUGE = 10**8
_BITS_OF_A_BYTE = 8
# So many values tell most weights from constants that hold one value.
_HEAD = 64
# The code of each float8 (e4m3) that float4 (e2m1) has, too.
_FLOAT4S = np.arange(16, dtype=np.uint8)
_CODES = np.zeros(256, np.uint8)
_CODES[_FLOAT4S.view(ml_dtypes.float4_e2m1fn).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)] = _FLOAT4S
_FLOAT8S = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)
_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}


class Unsuitable(Exception):  # noqa: N818 - not an error: the weight stays as it is
    """A weight cannot be compressed as asked; the text says why."""


@dataclass(frozen=True)
class Weight:
    """A weight of a program.

    Attributes:
        values: its values, in its own dtype; valid while the weight is replaced.
        output_axis: the axis of what the operation makes.
        input_axis: the axis that the operation sums over.
    """

    values: Tensor
    output_axis: int
    input_axis: int


class Builder:
    """Makes the operations that stand in for a weight, in front of it."""

    def __init__(self, weight_op: Any) -> None:
        self._op = weight_op
        self.element_type = weight_op.results[0].type.element_type

    def constant(self, values: Tensor, element_type: Any = None) -> Any:
        """A constant of the values' own type, or of an MLIR type that holds them.

        Values of less than a byte are packed, and equal values stored once: Core AI recognizes a zero
        offset by that.
        """
        if element_type is None:
            return dialect.constant(_as_array(values))
        kind = RankedTensorType.get(tuple(values.shape), element_type)
        is_integer = IntegerType.isinstance(element_type)
        first = values.flatten()[:1].float()
        if _are_equal(values):
            splat = (
                IntegerAttr.get(element_type, int(first))
                if is_integer
                else FloatAttr.get(element_type, float(first))
            )
            return dialect.ConstantOp(DenseElementsAttr.get_splat(kind, splat)).result
        width = IntegerType(element_type).width if is_integer else FloatType(element_type).width
        if width < _BITS_OF_A_BYTE:
            stream = coreai_kernels.pack_bits(values if is_integer else _codes(values), width).numpy()
        elif values.dtype in _FLOAT8S:
            stream = _as_array(values)
        else:
            return dialect.constant(_as_array(values), dtype=element_type)
        # The program holds the array itself, and keeps it alive.
        stored = DenseResourceElementsAttr.get_from_buffer(stream, "dense_resource", kind)  # type: ignore[arg-type]
        return dialect.ConstantOp(stored).result

    def zeros(self, shape: tuple[int, ...], element_type: Any) -> Any:
        """A constant of zeros."""
        return dialect.constant(np.zeros(shape, np.float32), dtype=element_type)

    def cast(self, value: Any, element_type: Any) -> Any:
        """A cast to another element type."""
        shape = RankedTensorType(value.type).shape
        return dialect.cast(value, RankedTensorType.get(shape, element_type))

    def shift_scale(self, data: Any, scale: Any, offset: Any) -> Any:
        """``scale * (data - offset)``, block by block, in the weight's type."""
        shape = tuple(RankedTensorType(scale.type).shape)
        return dialect.blockwise_shift_scale(data, scale, offset, self.zeros(shape, self.element_type))

    def look_up(self, indices: Any, lut: Any, axis: int) -> Any:
        """The entries of look-up tables."""
        return dialect.lut_to_dense(indices, lut, dialect.constant(np.array(axis, np.int16)))

    def scatter(self, values: Any, mask: Any) -> Any:
        """Values at the places of a mask, zeros elsewhere."""
        return dialect.sparse_with_bitmask_to_dense(dialect.build_sparse_with_bitmask(values, mask))


def compress(
    program: AIProgram,
    threshold: int,
    in_place: bool,
    replacement: Callable[[Weight, Builder], Any],
) -> AIProgram:
    """Replace each weight of a program by what ``replacement`` makes of it.

    Args:
        program: a program.
        threshold: weights with so many elements or fewer stay.
        in_place: change ``program`` itself, else a copy.
        replacement: gives the value that stands in for a weight. It raises :class:`Unsuitable` before it
            builds anything to leave the weight, with a warning in the log.

    Returns:
        The changed program.

    Raises:
        TypeError: ``program`` is no AIProgram.
    """
    if not isinstance(program, AIProgram):
        raise TypeError(f"coreai_program must be a coreai.authoring.AIProgram; got {type(program).__name__}")
    program = program if in_place else copy.deepcopy(program)
    module = program._module._mlir_module
    weights = [op for op in _operations(module.operation) if _is_weight(op, threshold)]
    # One buffer for all weights: fresh pages would cost more than the copies.
    buffer = np.empty(max(map(_bytes, weights), default=0), np.uint8)
    for op in weights:
        name = f"the constant of shape {tuple(op.results[0].type.shape)} that {_readers(op)} read"
        _replace(op, Weight(_values(op, buffer), *_axes(op, name)), replacement, name)
    return program


def check_threshold(weight_num_threshold: Any) -> None:
    """ValueError unless it is a number of elements."""
    if isinstance(weight_num_threshold, bool) or not isinstance(weight_num_threshold, int):
        raise ValueError(f"weight_num_threshold must be a number of elements; got {weight_num_threshold!r}")


def _replace(op: Any, weight: Weight, replacement: Callable[[Weight, Builder], Any], name: str) -> None:
    with op.context, op.location, InsertionPoint(op):
        try:
            ends = coreai_kernels.observe_range(weight.values, block_size=tuple(weight.values.shape))
            if not all(bool(end.isfinite()) for end in ends):
                raise Unsuitable("it has values that are not finite")
            result = replacement(weight, Builder(op))
        except Unsuitable as reason:
            logger.warning(f"{name} is left as it is: {reason}")
            return
    op.results[0].replace_all_uses_with(result)
    op.erase()


def _operations(root: Any) -> Iterator[Any]:
    for region in root.regions:
        for block in region.blocks:
            for op in block.operations:
                yield op.operation
                yield from _operations(op.operation)


def _is_weight(op: Any, threshold: int) -> bool:
    if op.name != "coreai.constant" or not RankedTensorType.isinstance(op.results[0].type):
        return False
    kind = RankedTensorType(op.results[0].type)
    if not kind.has_static_shape or not kind.rank or str(kind.element_type) not in _FLOATS:
        return False
    elements = int(np.prod(kind.shape))
    readers = [use.owner.operation.name for use in op.results[0].uses]
    if elements <= threshold or not readers:
        return False
    return elements >= _HUGE or all(reader in _USERS for reader in readers)


def _readers(op: Any) -> str:
    return ", ".join(sorted({use.owner.operation.name for use in op.results[0].uses}))


def _values(op: Any, buffer: np.ndarray) -> Tensor:
    """The values of a constant, in memory of ``buffer``."""
    kind = RankedTensorType(op.results[0].type)
    shape, dtype = tuple(kind.shape), _FLOATS[str(kind.element_type)]
    part = buffer[: _bytes(op)]
    compiler.copy_constant_value_to_array(constant_op=op, destination=part)
    return torch.from_numpy(part).view(dtype).reshape(shape)


def _bytes(op: Any) -> int:
    kind = RankedTensorType(op.results[0].type)
    return int(np.prod(tuple(kind.shape))) * _FLOATS[str(kind.element_type)].itemsize


def _axes(op: Any, name: str) -> tuple[int, int]:
    """The output and the input axis, as the operations that read the weight have them."""
    rank = len(op.results[0].type.shape)
    found = {axes for use in op.results[0].uses for axes in _axes_of_use(use, rank)}
    if len(found) == 1:
        return found.pop()
    if found:
        logger.warning(
            f"{name}: the operations that read it disagree about its axes; axis 0 is taken as output"
        )
    return 0, min(1, rank - 1)


def _axes_of_use(use: Any, rank: int, is_transposed: bool = False) -> Iterator[tuple[int, int]]:
    reader = use.owner.operation
    if reader.name == _TRANSPOSE and not is_transposed and rank >= 2:
        for further in reader.results[0].uses:
            yield from _axes_of_use(further, rank, is_transposed=True)
    elif reader.name in _MATMULS and rank >= 2:
        last_is_output = (use.operand_number == 1) != is_transposed
        yield (rank - 1, rank - 2) if last_is_output else (rank - 2, rank - 1)
    else:
        yield 0, min(1, rank - 1)


def _codes(values: Tensor) -> Tensor:
    """The codes in float4 (e2m1), one a byte, of values of it in float8 (e4m3)."""
    stored = bytearray(values.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
    return torch.frombuffer(stored.translate(_CODES.tobytes()), dtype=torch.uint8).reshape(values.shape)


def _are_equal(values: Tensor) -> bool:
    """Whether there are values, all of them equal."""
    flat = values.reshape(-1)
    # Weights differ within their first values, as a rule: the others need not be read.
    return bool(flat.numel()) and all(
        bool((part.float() == flat[:1].float()).all()) for part in (flat[:_HEAD], flat)
    )


def _as_array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if tensor.dtype in _FLOAT8S:
        name = str(tensor.dtype).removeprefix("torch.")
        return tensor.view(torch.uint8).numpy().view(getattr(ml_dtypes, name))
    return tensor.numpy()
