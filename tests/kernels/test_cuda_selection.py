"""The CUDA C++ of ``topk_mask`` without a GPU: its kernels run on the CPU, and what nvcc makes of them."""

import ctypes
import math
import random
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coreai_kernels.reference.topk_mask import topk_masks
from tests.kernels.cuda_support import ELEMENTS, NVCC, ROOT, compiled
from tests.kernels.cuda_support import emulated as emulate
from tests.kernels.mask_support import CONTENTS, values_of
from tests.kernels.support import DTYPES

SOURCE = ROOT / "csrc/cuda/topk_mask.cu"

pytestmark = pytest.mark.skipif(not SOURCE.exists(), reason="needs the source tree")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Small blocks of threads, and few chunks: small tensors go all the ways of large ones."""
    return emulate("select", tmp_path_factory.mktemp("emulation"))


def select(library: ctypes.CDLL, weights: list[Tensor], num_keep: int) -> list[Tensor]:
    masks = [torch.full_like(weight, 7.0) for weight in weights]
    count = len(weights)
    pointers, numbers = ctypes.c_void_p * count, ctypes.c_int64 * count
    library.topk_masks(
        count,
        (ctypes.c_int * count)(*(ELEMENTS[weight.dtype] for weight in weights)),
        pointers(*(weight.data_ptr() for weight in weights)),
        pointers(*(mask.data_ptr() for mask in masks)),
        numbers(*(weight.numel() for weight in weights)),
        ctypes.c_int64(num_keep),
    )
    return masks


@pytest.mark.parametrize("content", CONTENTS)
def test_kernels_on_the_cpu(emulated: ctypes.CDLL, content: str) -> None:
    choice = random.Random(content)
    for seed in range(14):
        weights = []
        for _ in range(choice.choice([1, 1, 2, 4])):
            numel = choice.choice([2, 63, 255, 257, 1000, 9001])
            x = values_of(content, (numel + 1,), seed).to(choice.choice(DTYPES))
            weights.append(x[1:] if choice.random() < 0.5 else x[:-1].clone())  # the first is not aligned
        numel = sum(weight.numel() for weight in weights)
        for keep in {1, numel - 1, choice.randint(1, numel - 1), numel // 2}:
            found = select(emulated, weights, keep)
            for got, wanted in zip(found, topk_masks(weights, keep), strict=True):
                assert torch.equal(got, wanted), (content, seed, keep)


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_compiled_by_nvcc(tmp_path: Path) -> None:
    """Machine code for three generations: no spills, no local memory, 16 bytes a load and store."""
    found = compiled(SOURCE, tmp_path)
    assert found.kernels == 3 + 3 * 9  # three of one block each; three passes over nine pairs of types
    assert max(found.registers) <= 64  # 512 threads: two blocks and more to a multiprocessor
    for name, text in found.ptx.items():
        if "pick_digit" in name or "sum_ties" in name or "start_select" in name:
            continue
        assert re.search(r"ld\.global\S*\.v[24]\.[bu](32|64)", text), name
        assert "write_mask" not in name or re.search(r"st\.global\S*\.v[24]\.[bu](32|64)", text), name


def test_every_content_has_ties_or_not() -> None:
    """The contents reach both: thresholds that are shared by more elements than are kept, and others."""
    shared = set()
    for content in CONTENTS:
        x = values_of(content, (1000,), 0).nan_to_num(nan=math.inf).abs()
        threshold = x.sort(descending=True).values[499]
        shared.add(bool((x == threshold).sum() > 1))
    assert shared == {True, False}
