"""The CUDA C++ of ``topk_mask`` without a GPU: its kernels run on the CPU, and what nvcc makes of them."""

import ctypes
import math
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coreai_kernels.formats import native_header
from coreai_kernels.reference.topk_mask import topk_masks
from tests.kernels.mask_support import CONTENTS, values_of
from tests.kernels.support import DTYPES

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc/cuda/topk_mask.cu"
COMPILER = shutil.which("c++") or shutil.which("g++")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHITECTURES = (80, 90, 100)
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

pytestmark = pytest.mark.skipif(not SOURCE.exists(), reason="needs the source tree")


def includes(folder: Path) -> list[str]:
    """Where the headers are: the project's, and the one that is made from the table of formats."""
    header = folder / "include/common/formats.h"
    header.parent.mkdir(parents=True)
    header.write_text(native_header())
    return [f"-I{ROOT / 'csrc'}", f"-I{folder / 'include'}"]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Blocks of 64 threads that take turns, and few chunks: small tensors go all the ways of large ones."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("emulation") / "select.so"
    command = [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", "-DCOREAI_EMULATED_THREADS=64"]
    command += [*includes(library.parent), f"-I{ROOT / 'tests/kernels'}", "-o", str(library)]
    command.append(str(ROOT / "tests/kernels/emulation/select.cpp"))
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return ctypes.CDLL(str(library))


def select(library: ctypes.CDLL, weights: list[Tensor], num_keep: int) -> list[Tensor]:
    masks = [torch.full_like(weight, 7.0) for weight in weights]
    count = len(weights)
    pointers, numbers = ctypes.c_void_p * count, ctypes.c_int64 * count
    library.topk_masks(
        count,
        (ctypes.c_int * count)(*(CODES[weight.dtype] for weight in weights)),
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
    include = Path(torch.__file__).parent / "include"
    command = [str(NVCC), "-std=c++20", "-O3", "--fmad=false", "--expt-relaxed-constexpr", "-DUSE_CUDA"]
    command += [
        "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",
        *includes(tmp_path),
        "-isystem",
        str(include),
    ]
    # PTX of the oldest, assembled for each: nothing in the source depends on the generation.
    codes = ",".join(f"sm_{arch}" for arch in ARCHITECTURES)
    command.append(f"-gencode=arch=compute_{ARCHITECTURES[0]},code=[{codes}]")
    command += ["-c", str(SOURCE), "-o", str(tmp_path / "topk_mask.o"), "-Xptxas", "-v"]
    command += ["--keep", "--keep-dir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    report = result.stdout + result.stderr
    assert result.returncode == 0, report[-3000:]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    kernels = 3 + 3 * 9  # three of one block each; three passes over nine pairs of types
    assert frames == [("0", "0", "0")] * (kernels * len(ARCHITECTURES))
    assert "lmem" not in report
    registers = [int(used) for used in re.findall(r"Used (\d+) registers", report)]
    assert max(registers) <= 64  # 512 threads: two blocks and more to a multiprocessor
    (ptx,) = tmp_path.glob("*.ptx")
    text = ptx.read_text()
    assert ".local" not in text
    entries = text.split(".entry ")[1:]
    assert len(entries) == kernels
    for entry in entries:
        name = entry[: entry.index("(")]
        if "pick_digit" in name or "sum_ties" in name or "start_select" in name:
            continue
        assert re.search(r"ld\.global\S*\.v[24]\.[bu](32|64)", entry), name
        assert "write_mask" not in name or re.search(r"st\.global\S*\.v[24]\.[bu](32|64)", entry), name


def test_every_content_has_ties_or_not() -> None:
    """The contents reach both: thresholds that are shared by more elements than are kept, and others."""
    shared = set()
    for content in CONTENTS:
        x = values_of(content, (1000,), 0).nan_to_num(nan=math.inf).abs()
        threshold = x.sort(descending=True).values[499]
        shared.add(bool((x == threshold).sum() > 1))
    assert shared == {True, False}
