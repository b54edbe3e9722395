"""Formats and blocks that the model goes through, on a matrix of 1024 x 4096."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from coreai_kernels import Format, ScaleFormat, Scheme

__all__ = ["DTYPES", "FORMATS", "SHAPE", "NumberFormat", "block_of"]

SHAPE = (1024, 4096)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BLOCKS = {"tensor": SHAPE, "rows": (1, SHAPE[1]), "columns": (SHAPE[0], 1)}


class NumberFormat(NamedTuple):
    """What a quantizer needs to know of a format, and the blocks that it is used with."""

    format: Format
    low: float
    high: float
    scheme: Scheme
    scales: ScaleFormat
    blocks: Sequence[str]


_ALL = ("tensor", "rows", "blocks of 32")
_SYMMETRIC, _ASYMMETRIC = Scheme.SYMMETRIC, Scheme.ASYMMETRIC
FORMATS: Mapping[str, NumberFormat] = {
    "int4": NumberFormat(Format.INT, -8.0, 7.0, _SYMMETRIC, ScaleFormat.FLOAT32, (*_ALL, "columns")),
    "int8": NumberFormat(Format.INT, -128.0, 127.0, _SYMMETRIC, ScaleFormat.FLOAT32, _ALL),
    "int8 asymmetric": NumberFormat(Format.INT, -128.0, 127.0, _ASYMMETRIC, ScaleFormat.FLOAT32, _ALL),
    "fp8": NumberFormat(Format.E4M3, -448.0, 448.0, _SYMMETRIC, ScaleFormat.FLOAT32, _ALL),
    "MXFP4": NumberFormat(Format.E2M1, -6.0, 6.0, _SYMMETRIC, ScaleFormat.E8M0, _ALL),
    "MXINT8": NumberFormat(Format.INT, -128.0, 127.0, _SYMMETRIC, ScaleFormat.E8M0, ("blocks of 32",)),
    "NVFP4": NumberFormat(Format.E2M1, -6.0, 6.0, _SYMMETRIC, ScaleFormat.E4M3, ("blocks of 16",)),
}


def block_of(blocks: str) -> tuple[int, int]:
    """Shape of a block: ``tensor``, ``rows``, ``columns`` or ``blocks of N``."""
    return _BLOCKS.get(blocks) or (1, int(blocks.removeprefix("blocks of ")))
