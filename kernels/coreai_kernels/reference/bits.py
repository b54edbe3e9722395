"""Packed bits: one per element for the backward pass, one to eight per element for storage."""

import torch
from torch import Tensor

__all__ = ["pack_bits", "pack_mask", "unpack_bits", "unpack_mask"]


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack the low ``bits`` bits of each value into a little-endian bit stream.

    Args:
        values: integer tensor, flattened in logical order.
        bits: 1 to 8.

    Returns:
        1-D uint8 tensor of ``ceil(numel * bits / 8)`` bytes. Value ``i`` takes the bits from ``i * bits`` up;
        bit ``j`` of the stream is bit ``j % 8`` of byte ``j // 8``. Trailing bits are zero.
    """
    flat = values.reshape(-1).to(torch.int32)
    planes = (flat.unsqueeze(1) >> torch.arange(bits, dtype=torch.int32, device=flat.device)) & 1
    return _bytes_from_bits(planes.reshape(-1))


def unpack_bits(packed: Tensor, bits: int, numel: int, signed: bool) -> Tensor:
    """Inverse of :func:`pack_bits`: 1-D int8 (``signed``, two's complement) or uint8 tensor of ``numel``."""
    planes = _bits_from_bytes(packed)[: numel * bits].reshape(numel, bits).to(torch.int32)
    values = (planes << torch.arange(bits, dtype=torch.int32, device=packed.device)).sum(1, dtype=torch.int32)
    if signed:
        values = torch.where(values >= 1 << (bits - 1), values - (1 << bits), values)
    return values.to(torch.int8 if signed else torch.uint8)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a flat boolean tensor: element ``i`` is bit ``i % 8`` of byte ``i // 8``."""
    return _bytes_from_bits(mask.reshape(-1).to(torch.int32))


def unpack_mask(packed: Tensor, numel: int) -> Tensor:
    """Inverse of :func:`pack_mask`."""
    return _bits_from_bytes(packed)[:numel].to(torch.bool)


def _bytes_from_bits(stream: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(stream, (0, -stream.numel() % 8)).reshape(-1, 8)
    weights = 1 << torch.arange(8, dtype=torch.int32, device=stream.device)
    return (padded * weights).sum(1, dtype=torch.int32).to(torch.uint8)


def _bits_from_bytes(packed: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) >> shifts) & 1).reshape(-1)
