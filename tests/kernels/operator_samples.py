"""Arguments of every operator, as small tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import coreai_kernels as ck
from coreai_kernels import Format, QuantConfig, RangeUpdate, Scheme

__all__ = ["INEXACT", "INT4", "MAIN", "SAMPLES", "leaf", "params"]


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def params(*grid: int) -> tuple[Tensor, Tensor]:
    return torch.rand(*grid) + 0.1, torch.randint(-8, 8, grid, dtype=torch.int32)


BLOCKS, INT4 = [1, 4], (int(Format.INT), -8.0, 7.0)
CONFIG = QuantConfig(
    block_size=tuple(BLOCKS),
    scheme=int(Scheme.ASYMMETRIC),
    format=INT4[0],
    quant_min=INT4[1],
    quant_max=INT4[2],
    update=int(RangeUpdate.MOVING_AVERAGE),
    averaging_constant=0.1,
)
STEP = CONFIG.arguments()

MAIN: dict[str, Callable[[], tuple[Any, ...]]] = {
    "fake_quantize": lambda: (leaf(4, 8), *params(4, 2), None, BLOCKS, *INT4, True),
    "fake_quantize_forward": lambda: (torch.randn(4, 8), *params(4, 2), None, BLOCKS, *INT4, True),
    "fake_quantize_backward": lambda: (torch.randn(4, 8), torch.randint(256, (4,), dtype=torch.uint8), []),
    "fake_quantize_backward_": lambda: (torch.randn(4, 8), torch.randint(256, (4,), dtype=torch.uint8), []),
    "fake_quantize_by_reciprocal_": lambda: (
        torch.randn(4, 16),
        torch.zeros(4, 2),
        torch.zeros(4, 2, dtype=torch.int32),
        8,
        True,
        False,
        -8.0,
        7.0,
        1e-6,
        True,
    ),
    "fake_quantize_by_reciprocal_backward": lambda: (
        torch.randn(4, 16),
        torch.randint(256, (8,), dtype=torch.uint8),
        torch.rand(4, 2) + 0.1,
        8,
    ),
    "observe_range": lambda: (torch.randn(4, 8), BLOCKS),
    "choose_qparams": lambda: (-torch.rand(4, 2), torch.rand(4, 2), 0, *INT4, 0),
    "observe_and_fake_quantize": lambda: (leaf(4, 8), -torch.rand(4, 2), torch.rand(4, 2), *STEP, True),
    "observe_and_fake_quantize_": lambda: (
        torch.randn(4, 8),
        *params(4, 2),
        torch.zeros(4, 2),
        -torch.rand(4, 2),
        torch.rand(4, 2),
        True,
        CONFIG.packed(),
        True,
    ),
    "observe_and_fake_quantize_unpacked_": lambda: (
        torch.randn(4, 8),
        *params(4, 2),
        torch.zeros(4, 2),
        -torch.rand(4, 2),
        torch.rand(4, 2),
        True,
        *STEP,
        True,
    ),
    "foreach_fake_quantize_forward": lambda: (
        [torch.randn(4, 8), torch.randn(8)],
        [torch.rand(4, 2) + 0.1, torch.rand(2) + 0.1],
        [],
        [],
        [1, 4, 4],
        *INT4,
        True,
    ),
    "foreach_fake_quantize_backward": lambda: (
        [torch.randn(4, 8), torch.randn(2, 8)],
        torch.randint(256, (32,), dtype=torch.uint8),
        [0, 16],
        [1, 0, 0, 1],
    ),
    "foreach_fake_quantize_backward_": lambda: (
        [torch.randn(4, 8), torch.randn(8, 2).t()],
        torch.randint(256, (32,), dtype=torch.uint8),
        [0, 16],
        [0, 1, 1, 0],
    ),
    "foreach_observe_and_fake_quantize_": lambda: (
        [torch.randn(4, 8), torch.randn(8)],
        [torch.zeros(4, 2), torch.zeros(2)],
        [torch.zeros(4, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)],
        [],
        [-torch.rand(4, 2), -torch.rand(2)],
        [torch.rand(4, 2), torch.rand(2)],
        True,
        [1, 4, 4],
        *STEP[1:],
        True,
    ),
    "quantize": lambda: (torch.randn(4, 8), *params(4, 2), None, BLOCKS, *INT4, torch.int8),
    "dequantize": lambda: (
        torch.ones(4, 8).to(torch.int8),
        *params(4, 2),
        None,
        BLOCKS,
        0,
        -8.0,
        torch.float32,
    ),
    "pack_bits": lambda: (torch.randint(16, (5, 7), dtype=torch.uint8), 4),
    "unpack_bits": lambda: (torch.randint(256, (18,), dtype=torch.uint8), 4, 35, True),
    "apply_mask": lambda: (leaf(4, 8), torch.randint(2, (4, 8)).float()),
    "block_mask": lambda: (torch.randn(4, 8), 3, BLOCKS),
    "nm_mask": lambda: (torch.randn(4, 8), 2, 4, 1),
    "top_blocks": lambda: (torch.randn(4, 8).T, 3, BLOCKS[::-1]),
    "topk_mask": lambda: (torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), 50),
    "topk_masks": lambda: ([torch.randn(4, 8), torch.randn(5, 3).T.bfloat16()], 20),
}


def indices(dim: int = 1) -> Tensor:
    return torch.randint(0, 4, (8 // dim, 6), dtype=torch.uint8)


def soft() -> tuple[Any, ...]:
    return (torch.randn(8, 6), torch.randn(2, 4, 1), 0.5, [4, 6])


def learned() -> tuple[Any, ...]:
    return (
        torch.randn(4, 8),
        torch.randn(4, 8),
        -torch.rand(4, 2),
        torch.rand(4, 2) + 0.1,
        [1, 4],
        0.0,
        15.0,
    )


def sampled(count: int) -> tuple[Any, ...]:
    return (*(torch.randn(4, 8) for _ in range(count)), torch.full((), 3, dtype=torch.int64), 5)


# Some operators have several: behind their names, of what kind. Clustering is left out.
SAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    **MAIN,
    "choose_qparams, e8m0": lambda: (
        -torch.rand(4, 2),
        torch.rand(4, 2),
        0,
        int(Format.E4M3),
        -448.0,
        448.0,
        1,
    ),
    "choose_qparams, e4m3": lambda: (-torch.rand(4, 2), torch.rand(4, 2), 0, int(Format.E2M1), -6.0, 6.0, 2),
    "choose_qparams, asymmetric": lambda: (-torch.rand(4, 2).half(), torch.rand(4, 2).half(), 2, *INT4, 0),
    "fake_quantize_forward, e2m1": lambda: (
        torch.randn(4, 8).bfloat16(),
        params(4, 2)[0],
        None,
        None,
        BLOCKS,
        int(Format.E2M1),
        -6.0,
        6.0,
        True,
    ),
    "topk_masks, half": lambda: ([torch.randn(4, 8).half(), torch.randn(5, 3).half()], 20),
    "gptq_columns": lambda: (
        torch.randn(6, 5),
        torch.eye(6) + torch.rand(6, 6).tril(),
        *params(3, 5),
        None,
        [0, 0, 1, 1, 2, 2],
        *INT4,
    ),
    "learnable_range_backward": learned,
    "learnable_range_backward, symmetric": lambda: (*learned()[:2], None, *learned()[3:5], -8.0, 7.0),
    "lookup": lambda: (indices(), torch.randn(2, 4, 1), [4, 6]),
    "lookup, masked": lambda: (indices(), torch.randn(2, 4, 1), [4, 6], torch.rand(8, 6) < 0.5),
    "lookup, vectors": lambda: (indices(2), torch.randn(2, 4, 2), [4, 6]),
    "lookup_packed": lambda: (ck.pack_bits(indices(), 2), torch.randn(2, 4, 1), [8, 6], [4, 6], 2),
    "lookup_backward": lambda: (torch.randn(8, 6), indices(), [4, 6], 4, 1),
    "lookup_backward, vectors": lambda: (torch.randn(8, 6), indices(2), [4, 6], 4, 2),
    "palettize": lambda: (torch.randn(8, 6), torch.randn(2, 4, 1), [4, 6]),
    "palettize, decimals": lambda: (torch.randn(8, 6), torch.randn(2, 4, 1), [4, 6], 2),
    "palettize, vectors": lambda: (torch.randn(8, 6), torch.randn(2, 4, 2), [4, 6]),
    "sampled_mask": lambda: sampled(2),
    "sampled_mask_forward": lambda: sampled(2),
    "sampled_mask_backward": lambda: sampled(3),
    "soft_palettize": soft,
    "soft_palettize_backward": lambda: (torch.randn(8, 6), *soft()),
    "soft_centroids": soft,
    "soft_centroids_backward": lambda: (
        torch.randn(2, 4, 1),
        torch.randn(2, 4, 1),
        torch.rand(2, 4),
        *soft(),
    ),
}

# Sums whose order is free, and exponentials.
INEXACT = {
    "learnable_range_backward",
    "lookup_backward",
    "soft_centroids",
    "soft_centroids_backward",
    "soft_palettize",
    "soft_palettize_backward",
}
