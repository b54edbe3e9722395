"""Ahead of time: palettes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from coreai_kernels.triton import lloyd, palettes, soft_palettize
from tests.kernels.aot_support import ARCHITECTURES, BF16, FP32, Variant, check, meta

BYTES = torch.uint8
WHOLE, GROUPS = [1024, 4096], [16, 4096]


def centroids(blocks: list[int], clusters: int, dim: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    return meta(1024 * 4096 // (blocks[0] * blocks[1]), clusters, dim, dtype=dtype)


def palettize(blocks: list[int], clusters: int, dim: int, dtype: torch.dtype) -> Callable[[], Any]:
    return lambda: palettes.palettize(meta(1024, 4096, dtype=dtype), centroids(blocks, clusters, dim), blocks)


def lookup(blocks: list[int], clusters: int, dim: int, dtype: torch.dtype) -> Callable[[], Any]:
    indices = meta(1024 // dim, 4096, dtype=BYTES)
    return lambda: palettes.lookup(indices, centroids(blocks, clusters, dim, dtype), blocks)


def masked(clusters: int, dtype: torch.dtype) -> Callable[[], Any]:
    indices, mask = meta(1024, 4096, dtype=BYTES), meta(1024, 4096, dtype=torch.bool)
    return lambda: palettes.lookup(indices, centroids(WHOLE, clusters, 1, dtype), WHOLE, mask)


def packed(bits: int, dtype: torch.dtype) -> Callable[[], Any]:
    data = meta(1024 * 4096 * bits // 8, dtype=BYTES)
    table = centroids(GROUPS, 2**bits, 1, dtype)
    return lambda: palettes.lookup_packed(data, table, [1024, 4096], GROUPS, bits)


def backward(clusters: int, dim: int, dtype: torch.dtype) -> Callable[[], Any]:
    grad, indices = meta(1024, 4096, dtype=dtype), meta(1024 // dim, 4096, dtype=BYTES)
    return lambda: palettes.lookup_backward(grad, indices, WHOLE, clusters, dim)


def soft(name: str, clusters: int, dim: int, dtype: torch.dtype) -> Callable[[], Any]:
    weight, table = meta(1024, 4096, dtype=dtype), centroids(GROUPS, clusters, dim)
    before = {
        "soft_palettize_backward": (weight,),
        "soft_centroids_backward": (table, table, meta(64, clusters)),
    }
    return lambda: getattr(soft_palettize, name)(*before.get(name, ()), weight, table, 0.1, GROUPS)


def iterations(clusters: int, dim: int, weighted: bool) -> Callable[[], Any]:
    vectors, start = meta(4, dim, 1 << 20), meta(2, 4, clusters, dim)
    mass = meta(4, 1 << 20) if weighted else None
    center, total = meta(4, dim, dtype=torch.float64), meta(4, dtype=torch.float64)
    return lambda: lloyd.lloyd(vectors, mass, start, center, total, 1, 1e-4)


LLOYD = ("assign_and_sum", "move", "assign_and_sum")
VARIANTS: dict[str, tuple[tuple[str, ...], Callable[[], Any]]] = {
    "palettize-16-fp32": (("nearest_scalars",), palettize(WHOLE, 16, 1, FP32)),
    "palettize-256-bf16": (("nearest_scalars",), palettize(GROUPS, 256, 1, BF16)),
    "palettize-vectors-fp32": (("nearest_vectors",), palettize(WHOLE, 16, 4, FP32)),
    "lookup-16-fp32": (("lookup",), lookup(WHOLE, 16, 1, FP32)),
    "lookup-256-bf16": (("lookup",), lookup(GROUPS, 256, 1, BF16)),
    "lookup-vectors-bf16": (("lookup",), lookup(WHOLE, 16, 2, BF16)),
    "lookup-masked-16-bf16": (("lookup",), masked(16, BF16)),
    "lookup-packed-4-bf16": (("lookup",), packed(4, BF16)),
    "lookup-packed-3-fp32": (("lookup",), packed(3, FP32)),
    "backward-16-fp32": (("sum_by_index",), backward(16, 1, FP32)),
    "backward-vectors-bf16": (("sum_by_index",), backward(64, 2, BF16)),
    "lloyd-16-2": (LLOYD, iterations(16, 2, False)),
    "lloyd-256-4-weighted": (LLOYD, iterations(256, 4, True)),
    **{
        f"{name}-{clusters}-{dim}": (("soft",), soft(name, clusters, dim, dtype))
        for name in (
            "soft_palettize",
            "soft_palettize_backward",
            "soft_centroids",
            "soft_centroids_backward",
        )
        for clusters, dim, dtype in ((16, 1, FP32), (64, 2, BF16))
    },
}


@ARCHITECTURES
@pytest.mark.parametrize("name", VARIANTS)
def test_compiled(name: str, arch: int, compiled: list[tuple[str, Any]], tmp_path: Path) -> None:
    kernels, run = VARIANTS[name]
    # Exponentials are approximate.
    check(Variant(name, run, kernels, False, False, False, exact=kernels != ("soft",)), compiled, tmp_path)
