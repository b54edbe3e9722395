"""``pack_bits`` and ``unpack_bits``: 1- to 8-bit values as a dense bit stream.

A width that divides 8 never straddles a byte. The others do: 8 values fill as many bytes as they have bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from coreai_kernels.triton.launch import launch

__all__ = ["pack_bits", "unpack_bits"]

_TILE = 2048


@triton.jit
def _pack(values, packed, numel, size, BITS: tl.constexpr, TILE: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * TILE
    IN: tl.constexpr = 8 // BITS if 8 % BITS == 0 else 8
    OUT: tl.constexpr = 1 if 8 % BITS == 0 else BITS
    group = tl.arange(0, TILE // IN)
    lane = tl.arange(0, IN)
    element = group[:, None] * IN + lane[None, :]
    value = tl.load(values + start + element, mask=element < numel - start, other=0)
    first_byte = start // IN * OUT
    if OUT == 1:
        field = value.to(tl.int32) & ((1 << BITS) - 1)
        byte = tl.sum(field << (lane * BITS)[None, :], 1)
        tl.store(packed + first_byte + group, byte.to(tl.uint8), mask=group < size - first_byte)
    else:
        field = value.to(tl.int64) & ((1 << BITS) - 1)
        word = tl.sum(field << (lane * BITS).to(tl.int64)[None, :], 1)
        byte = word[:, None] >> (lane * 8).to(tl.int64)[None, :]
        place = group[:, None] * OUT + lane[None, :]
        valid = (lane < OUT)[None, :] & (place < size - first_byte)
        tl.store(packed + first_byte + place, (byte & 0xFF).to(tl.uint8), mask=valid)


@triton.jit
def _unpack(packed, values, numel, size, BITS: tl.constexpr, SIGNED: tl.constexpr, TILE: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * TILE
    if 8 % BITS == 0:
        IN: tl.constexpr = 8 // BITS
        group = tl.arange(0, TILE // IN)
        lane = tl.arange(0, IN)
        byte = tl.load(packed + start // IN + group, mask=group < size - start // IN, other=0).to(tl.int32)
        element = group[:, None] * IN + lane[None, :]
        value = byte[:, None] >> (lane * BITS)[None, :]
    else:
        element = tl.arange(0, TILE)
        bit = element * BITS
        here = start // 8 * BITS + bit // 8
        low = tl.load(packed + here, mask=here < size, other=0).to(tl.int32)
        high = tl.load(packed + here + 1, mask=here + 1 < size, other=0).to(tl.int32)
        value = (low | (high << 8)) >> (bit % 8)
    value = value & ((1 << BITS) - 1)
    if SIGNED:
        value = (value ^ (1 << (BITS - 1))) - (1 << (BITS - 1))
    tl.store(values + start + element, value.to(values.dtype.element_ty), mask=element < numel - start)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """See ``reference/bits.py``."""
    numel = values.numel()
    size = (numel * bits + 7) // 8
    packed = torch.empty(size, dtype=torch.uint8, device=values.device)
    if numel:
        programs = triton.cdiv(numel, _TILE)
        flat = values.contiguous()
        launch(_pack, programs, packed, flat, packed, numel, size, BITS=int(bits), TILE=_TILE, warps=4)
    return packed


def unpack_bits(packed: Tensor, bits: int, numel: int, signed: bool) -> Tensor:
    """See ``reference/bits.py``."""
    values = torch.empty(numel, dtype=torch.int8 if signed else torch.uint8, device=packed.device)
    if numel:
        programs = triton.cdiv(numel, _TILE)
        launch(
            _unpack,
            programs,
            packed,
            packed.contiguous(),
            values,
            numel,
            packed.numel(),
            BITS=int(bits),
            SIGNED=bool(signed),
            TILE=_TILE,
            warps=4,
        )
    return values
