"""``quantize`` and ``dequantize``: to and from the dtype that a compressed model stores."""

import torch
from torch import Tensor

from coreai_kernels.triton import tiles
from coreai_kernels.triton.layout import dense, geometry_of

__all__ = ["dequantize", "quantize"]


def quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minval: Tensor | None,
    block_size: list[int],
    format: int,
    quant_min: float,
    quant_max: float,
    dtype: torch.dtype,
) -> Tensor:
    """See ``reference/fake_quantize.py``."""
    input = dense(input)
    output = torch.empty_like(input, dtype=dtype)
    tiles.run(
        tiles.QUANTIZE,
        geometry_of(input, block_size),
        input,
        output,
        None,
        scale,
        zero_point,
        minval,
        format,
        quant_min,
        quant_max,
    )
    return output


def dequantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minval: Tensor | None,
    block_size: list[int],
    format: int,
    quant_min: float,
    dtype: torch.dtype,
) -> Tensor:
    """See ``reference/fake_quantize.py``."""
    input = dense(input)
    output = torch.empty_like(input, dtype=dtype)
    # The upper bound plays no part.
    bound = quant_min
    tiles.run(
        tiles.DEQUANTIZE,
        geometry_of(input, block_size),
        input,
        output,
        None,
        scale,
        zero_point,
        minval,
        format,
        quant_min,
        bound,
    )
    return output
