"""Weights to make masks of, and comparisons of a backend's masks with the reference's."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

import coreai_kernels as ck
from coreai_kernels.ops.library import implementation
from tests.kernels.support import DTYPES, SPECIAL, assert_same_bits, assert_same_memory_format

CONTENTS = ("normal", "ties", "zeros", "equal", "nans", "special", "subnormal", "wide", "growing")
LAYOUTS = ("contiguous", "transposed", "channels_last", "sliced", "expanded")


def values_of(content: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Values in float64 that are hard to rank in one way or another."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    chosen = torch.rand(shape, generator=generator) < 0.5
    if content == "ties":
        return (2 * x).round()
    if content == "zeros":
        return torch.where(chosen, torch.where(x > 0, 0.0, -0.0), x)
    if content == "equal":
        return torch.where(chosen, torch.full_like(x, 0.75), torch.full_like(x, -0.75))
    if content == "nans":
        return torch.where(chosen, torch.where(x > 0, math.nan, -math.nan), x)
    if content == "special":
        which = torch.randint(0, len(SPECIAL), shape, generator=generator)
        return torch.where(chosen, torch.tensor(SPECIAL, dtype=x.dtype)[which], x)
    if content == "subnormal":
        return x * 2.0**-140
    if content == "growing":
        return x * torch.exp2(torch.linspace(-40, 40, x.numel(), dtype=x.dtype)).reshape(shape)
    if content == "wide":
        return x * torch.exp2(20 * torch.randn(shape, generator=generator, dtype=x.dtype))
    return x


def laid_out(x: Tensor, layout: str) -> Tensor:
    """``x`` with other strides; some layouts need axes that it may not have."""
    if layout == "transposed" and x.dim() >= 2:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced" and x.dim() >= 1:
        wide = torch.zeros([*x.shape[:-1], 2 * x.shape[-1] + 1], dtype=x.dtype, device=x.device)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "expanded" and x.dim() >= 1:
        return x[..., :1].expand(x.shape)
    return x


@dataclass
class Weight:
    shape: tuple[int, ...]
    content: str
    layout: str
    dtype: torch.dtype
    seed: int = 0

    def tensor(self, device: str = "cpu") -> Tensor:
        x = values_of(self.content, self.shape, self.seed).to(self.dtype).to(device)
        return laid_out(x, self.layout)


@st.composite
def weights(draw: st.DrawFn) -> Weight:
    dims = draw(st.integers(0, 4))
    sizes = [1, 2, 3, 4, 5, 8, 12, 16, 17, 32, 64, 96, 100, 257][: {0: 1, 1: 14, 2: 14, 3: 9, 4: 8}[dims]]
    shape = [draw(st.sampled_from(sizes)) for _ in range(dims)]
    if dims and draw(st.integers(0, 7)) == 0:
        shape[draw(st.integers(0, dims - 1))] *= draw(st.sampled_from([0, 48, 150]))
    if math.prod(shape) > 200_000:
        shape[-1] = 2
    return Weight(
        tuple(shape),
        draw(st.sampled_from(CONTENTS)),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 999)),
    )


def on_both(backend: str, device: str, run: Callable[[str], list[Tensor]], what: str) -> list[Tensor]:
    """Masks of ``run(device)`` by the backend, equal to those of the reference on the CPU."""
    with ck.use_backend("reference"):
        wanted = run("cpu")
    with ck.use_backend(backend):
        got = run(device)
    assert len(got) == len(wanted)
    for mask, expected in zip(got, wanted, strict=True):
        assert_same_bits(mask.cpu(), expected, what)
        assert_same_memory_format(mask, expected)
    return got


def check_topk(backend: str, device: str, weights: list[Weight], num_keep: int) -> None:
    def run(on: str) -> list[Tensor]:
        tensors = [weight.tensor(on) for weight in weights]
        if len(tensors) == 1:
            return [ck.topk_mask(tensors[0], num_keep)]
        return ck.topk_masks(tensors, num_keep)

    masks = on_both(backend, device, run, f"top {num_keep} of {weights}")
    assert sum(int(mask.sum(dtype=torch.float64)) for mask in masks) == num_keep


def check_nm(backend: str, device: str, weight: Weight, n: int, m: int, axis: int) -> None:
    on_both(
        backend,
        device,
        lambda on: [ck.nm_mask(weight.tensor(on), n, m, axis)],
        f"{n}:{m} along {axis} of {weight}",
    )


def check_blocks(
    backend: str, device: str, weight: Weight, num_keep: int, block_size: tuple[int, ...]
) -> None:
    on_both(
        backend,
        device,
        lambda on: [ck.block_mask(weight.tensor(on), num_keep, block_size)],
        f"{num_keep} blocks {block_size} of {weight}",
    )


def check_slices(backend: str, device: str, weight: Weight, num_keep: int, axis: int) -> None:
    """The mask that is a view of one value a slice, against the one that is written."""
    x = weight.tensor(device)
    with ck.use_backend("reference"):
        wanted = ck.channel_mask(weight.tensor(), num_keep, axis)
    with ck.use_backend(backend):
        got = ck.channel_mask(x, num_keep, axis, expanded=True)
    assert_same_bits(got.cpu(), wanted, f"{num_keep} slices along {axis} of {weight}")
    assert x.numel() == 0 or all(got.stride(i) == 0 for i in range(x.dim()) if i != axis and x.size(i) > 1)


def check_product(backend: str, device: str, weight: Weight, factor: Weight) -> None:
    on_both(
        backend,
        device,
        lambda on: [implementation("apply_mask")(weight.tensor(on), factor.tensor(on))],
        f"product of {weight} and {factor}",
    )
