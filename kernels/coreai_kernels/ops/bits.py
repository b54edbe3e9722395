"""``pack_bits`` and ``unpack_bits``: 1- to 8-bit values as a dense bit stream."""

import torch
from torch import Tensor

from coreai_kernels.ops.library import define, implementation
from coreai_kernels.reference import bits as reference
from coreai_kernels.triton import registry as triton

__all__ = ["pack_bits", "unpack_bits"]

define(
    "pack_bits",
    "(Tensor values, int bits) -> Tensor",
    reference=reference.pack_bits,
    fake=lambda values, bits: values.new_empty((values.numel() * bits + 7) // 8, dtype=torch.uint8),
    triton=triton.get("pack_bits"),
)
define(
    "unpack_bits",
    "(Tensor packed, int bits, int numel, bool signed) -> Tensor",
    reference=reference.unpack_bits,
    fake=lambda packed, bits, numel, signed: packed.new_empty(
        numel, dtype=torch.int8 if signed else torch.uint8
    ),
    triton=triton.get("unpack_bits"),
)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be in 1..8; got {bits}")


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack the low bits of each value, in logical order, into a little-endian bit stream.

    Args:
        values: int8 or uint8 tensor of any shape; only the low ``bits`` bits of each value are kept,
            which for negative values is two's complement.
        bits: bits per value, 1 to 8.

    Returns:
        1-D uint8 tensor of ``ceil(numel * bits / 8)`` bytes: value ``i`` starts at bit ``i * bits``, the
        lowest bit of a byte first. For 4 bits that is two values a byte, the first in the low half, as
        ``torch.float4_e2m1fn_x2`` has it. Spare bits at the end are zero.

    Raises:
        ValueError: ``bits`` is out of range.
        TypeError: ``values`` is neither int8 nor uint8.
    """
    _check_bits(bits)
    if values.dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"values must be int8 or uint8; got {values.dtype}")
    return implementation("pack_bits")(values, bits)  # type: ignore[no-any-return]


def unpack_bits(packed: Tensor, bits: int, numel: int, *, signed: bool = False) -> Tensor:
    """Inverse of :func:`pack_bits`.

    Args:
        packed: 1-D uint8 tensor.
        bits: bits per value, 1 to 8.
        numel: number of values.
        signed: read the values as two's complement.

    Returns:
        1-D tensor of ``numel`` values, int8 if ``signed``, else uint8.

    Raises:
        ValueError: ``bits`` is out of range, or ``packed`` has not ``ceil(numel * bits / 8)`` bytes.
        TypeError: ``packed`` is not uint8.
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed must be uint8; got {packed.dtype}")
    if packed.dim() != 1 or numel < 0 or packed.numel() != (numel * bits + 7) // 8:
        raise ValueError(
            f"packed must be 1-D with {(numel * bits + 7) // 8} bytes for {numel} values of {bits} bits; "
            f"got shape {tuple(packed.shape)}"
        )
    return implementation("unpack_bits")(packed, bits, numel, signed)  # type: ignore[no-any-return]
