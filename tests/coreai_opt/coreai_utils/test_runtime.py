"""Compressed programs, run by Core AI's runtime, compute nearly what the float model does."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

coreai_torch = pytest.importorskip("coreai_torch", reason="needs the extra coreai")

from coreai import authoring, runtime  # noqa: E402

from coreai_opt.coreai_utils import (  # noqa: E402
    CompressionGranularity,
    DType,
    QScheme,
    palettize_weights,
    quantize_weights,
    sparsify_weights,
)

G = CompressionGranularity
Change = Callable[[Any], Any]
# What is done to the weights, and the relative error that it may leave.
CASES: dict[str, tuple[Change, float]] = {
    "int8": (lambda p: quantize_weights(p, DType.INT8), 0.01),
    "uint8 asymmetric": (lambda p: quantize_weights(p, DType.UINT8, QScheme.ASYMMETRIC), 0.01),
    "int4 blocks": (lambda p: quantize_weights(p, DType.INT4, granularity=G.PER_BLOCK, block_size=16), 0.12),
    "uint4 asymmetric blocks": (
        lambda p: quantize_weights(p, DType.UINT4, QScheme.ASYMMETRIC, G.PER_BLOCK, block_size=16),
        0.12,
    ),
    "fp8": (lambda p: quantize_weights(p, DType.FP8_E4M3FN), 0.05),
    "fp8, scales of powers of two": (
        lambda p: quantize_weights(
            p, DType.FP8_E4M3FN, granularity=G.PER_BLOCK, block_size=16, scale_dtype=DType.FP8_E8M0FNU
        ),
        0.05,
    ),
    "fp4": (lambda p: quantize_weights(p, DType.FP4_E2M1FN, granularity=G.PER_BLOCK), 0.2),
    "palettes of 8 bits": (lambda p: palettize_weights(p, None, 8), 0.02),
    "palettes of 6 bits, groups": (
        lambda p: palettize_weights(p, None, 6, G.PER_GROUPED_CHANNEL, group_size=8),
        0.05,
    ),
    "scaled palettes": (lambda p: palettize_weights(p, None, 8, enable_per_channel_scale=True), 0.02),
    "scaled palettes of int8": (
        lambda p: palettize_weights(p, DType.INT8, 8, enable_per_channel_scale=True),
        0.03,
    ),
    "palettes of uint8": (lambda p: palettize_weights(p, DType.UINT8, 6), 0.05),
    "vectors": (lambda p: palettize_weights(p, None, 8, cluster_dim=2), 0.35),
    "all values, sparse": (lambda p: sparsify_weights(p, 0.0), 1e-3),
    "a few zeros": (lambda p: sparsify_weights(p, 0.1), 0.1),
    "a few zeros, uint8": (lambda p: sparsify_weights(p, 0.1, quantize_dtype=DType.UINT8), 0.1),
    "a few zeros, int8": (lambda p: sparsify_weights(p, 0.1, quantize_dtype=DType.INT8), 0.1),
    "a few zeros, palettes": (lambda p: sparsify_weights(p, 0.1, palettize_nbits=8), 0.1),
    "1:8": (lambda p: sparsify_weights(p, None, n_m_ratio=(1, 8)), 0.12),
}


class Both(nn.Module):
    """A convolution, and products with a weight on either side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(16, 32, 3, padding=1)
        self.linear = nn.Linear(32, 64)
        self.right = nn.Parameter(torch.randn(64, 32) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(self.conv(x).mean((2, 3)))) @ self.right


X = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Both().eval()


@pytest.fixture(scope="module")
def program(model: nn.Module) -> Any:
    exported = torch.export.export(model, (X,)).run_decompositions(coreai_torch.get_decomp_table())
    converter = coreai_torch.TorchConverter()
    converter.add_exported_program(exported, input_names=["x"], output_names=["y"], entrypoint_name="main")
    return converter.to_coreai()


def run(program: Any, path: Path) -> Tensor:
    program.save_asset(path)

    async def call() -> Any:
        async with authoring.AIModelAsset.load(path).executable() as executable:
            return await executable.load_function("main")(inputs={"x": runtime.NDArray(X)})

    result = asyncio.run(call())
    found = result["y"] if isinstance(result, Mapping) else next(iter(result))
    return torch.from_numpy(found.numpy().copy())


@pytest.mark.parametrize("name", CASES)
def test_outputs(name: str, model: nn.Module, program: Any, tmp_path: Path):
    change, most = CASES[name]
    with torch.no_grad():
        expected = model(X)
    found = run(change(program), tmp_path / "net.aimodel")
    error = float((found - expected).norm() / expected.norm())
    assert error <= most
    # It was compressed: only what keeps all values leaves no error.
    assert error > 1e-4 or name == "all values, sparse"
