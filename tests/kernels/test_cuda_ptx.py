"""What nvcc makes of the CUDA C++ kernels, run by the interpreter of PTX: bit for bit the reference's.

The operators are compiled for the CPU with launches that tell what a kernel is given. The compiled kernel of
that name is then interpreted, on the memory that the operator allocated.
"""

import ctypes
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import coreai_kernels as ck  # noqa: F401  (defines the operators)
from coreai_kernels import Format, QuantConfig
from coreai_kernels.reference import fake_quantize as reference
from coreai_kernels.reference.observe_and_fake_quantize import observe_and_fake_quantize as reference_step
from tests.emulation.ptx import launch
from tests.kernels.cuda_support import NVCC, ROOT, includes, recorded_operators
from tests.kernels.support import SPECIAL, assert_same_bits
from tests.kernels.triton_support import STEPS

pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc/cuda").exists(), reason="needs the source tree"),
    pytest.mark.skipif(NVCC is None, reason="needs nvcc"),
]
OPERATORS = [
    *("fake_quantize_forward", "fake_quantize", "fake_quantize_backward", "fake_quantize_backward_"),
    *("observe_and_fake_quantize", "observe_and_fake_quantize_", "observe_and_fake_quantize_unpacked_"),
]
THREADS = 256
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_ARGUMENT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
_LAUNCH = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int64, ctypes.c_bool)


class Recorded:
    """Operators whose launches are compiled by nvcc and interpreted.

    Attributes:
        names: kernels that were launched.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.library = recorded_operators("observe_and_fake_quantize", OPERATORS, folder)
        self.names: list[str] = []
        self._arguments: list[bytes] = []
        self._memory: list[Tensor] = []
        self._ptx: dict[str, str] = {}
        self._error: Exception | None = None
        self._callbacks = (_ARGUMENT(self._argument), _LAUNCH(self._launch), _ARGUMENT(self._allocated))
        self.library.tell(*self._callbacks)

    def __call__(self, operator: str, *arguments: Any) -> Any:
        self._memory = [value for value in arguments if isinstance(value, Tensor)]
        result = getattr(torch.ops.coreai_recorded, operator)(*arguments)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return result

    def _argument(self, data: int, size: int) -> None:
        self._arguments.append(ctypes.string_at(data, size))

    def _allocated(self, data: int, size: int) -> None:
        if size:
            self._memory.append(
                torch.frombuffer((ctypes.c_uint8 * size).from_address(data), dtype=torch.uint8)
            )

    def _launch(self, symbol: bytes, blocks: int, whole: bool) -> None:
        name, arguments = symbol.decode(), self._arguments
        self._arguments = []
        self.names.append(name)
        if self._error is not None:
            return
        try:  # an exception does not pass through C++
            if name not in self._ptx:
                self._ptx[name] = compiled(name, self.folder)
            # Threads and blocks start in order or the other way round, by turns.
            reverse = len(self.names) % 2 == 0
            launch(
                self._ptx[name],
                blocks,
                THREADS,
                arguments,
                name=name,
                whole=whole,
                reverse=reverse,
                reachable=self._memory,
            )
        except Exception as error:  # noqa: BLE001
            self._error = error


def compiled(symbol: str, folder: Path) -> str:
    """PTX of one kernel."""
    text = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    # Enumerators come out as "(coreai::Format)0", and a default argument as "<void>".
    match = re.fullmatch(r"void coreai::cuda::(.*)", text)
    assert match is not None, text
    declaration = re.sub(r"\(coreai::(cuda::)?(\w+)\)(\d+)", r"coreai::\1\2(\3)", match[1])
    source = folder / f"{abs(hash(symbol))}.cu"
    header = "quantize/held_steps.cuh"
    masked = "quantize/masked_gradient.cuh"
    source.write_text(
        f'#include "cuda/{header}"\n#include "cuda/{masked}"\n'
        f"namespace coreai::cuda {{ template __global__ void {declaration}; }}\n"
    )
    target = source.with_suffix(".ptx")
    command = [str(NVCC), "-std=c++20", "-O3", "--fmad=false", "--expt-relaxed-constexpr", *includes(folder)]
    done = subprocess.run(
        [*command, "-arch=sm_90", "-ptx", "-o", str(target), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return target.read_text()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(tmp_path_factory.mktemp("recorded"))


def values_of(shape: Sequence[int], dtype: torch.dtype, special: bool) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(list(shape), generator=generator).to(dtype)
    if special:
        for value in SPECIAL:
            x.view(-1)[torch.randint(0, x.numel(), (1,), generator=generator)] = value
    return x


@pytest.mark.parametrize(
    ("shape", "block", "fmt", "dtype"),
    [
        ((16, 1024), (16, 1024), "int4", BF16),
        ((6, 2048), (1, 2048), "e4m3", BF16),
        ((4, 1024), (1, 32), "int4", FP32),
        ((33, 64), (33, 1), "e4m3", FP32),
        ((3, 45), (1, 9), "int4", FP16),
    ],
)
def test_forward(recorded: Recorded, shape: Any, block: Any, fmt: str, dtype: torch.dtype) -> None:
    kind = {"int4": (Format.INT, -8.0, 7.0), "e4m3": (Format.E4M3, -448.0, 448.0)}[fmt]
    grid = [size // part for size, part in zip(shape, block, strict=True)]
    scale = 1.5 * (torch.rand(grid, generator=torch.Generator().manual_seed(1)) + 0.5) / kind[2]
    for special in (False, True):
        x = values_of(shape, dtype, special)
        found = recorded("fake_quantize_forward", x, scale, None, None, list(block), *kind, True)
        wanted = reference.forward(x, scale, None, None, block, *kind, True)
        assert_same_bits(found[0], wanted[0], "output")
        assert_same_bits(found[1], wanted[1], "mask")


@pytest.mark.parametrize(("dtype", "in_place"), [(BF16, False), (FP16, False), (FP32, True)], ids=str)
def test_backward(recorded: Recorded, dtype: torch.dtype, in_place: bool) -> None:
    grad = values_of((9, 1024), dtype, True)
    mask = torch.randint(0, 256, (9 * 128,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask[:700] = 255
    wanted = reference.backward(grad, mask, [0, 1])
    if in_place:
        recorded("fake_quantize_backward_", grad, mask, [])
        found = grad
    else:
        found = recorded("fake_quantize_backward", grad, mask, [])
    assert_same_bits(found, wanted)


@pytest.mark.parametrize(
    ("shape", "block", "step", "dtype", "kernels"),
    [
        ((9, 512), (1, 512), "int4_latest", BF16, ["step_of_rows"]),
        ((3, 4096), (1, 4096), "uint8_average", FP32, ["step_of_rows"]),
        ((5, 1024), (1, 32), "e2m1_e8m0", BF16, ["step_of_short_runs"]),
        ((5, 1024), (1, 32), "e2m1_e8m0", FP32, ["step_of_short_runs"]),
        ((5, 1024), (1, 32), "mxint8", BF16, ["step_of_short_runs"]),
        ((4, 512), (1, 32), "uint8_minval_global", FP32, ["step_of_short_runs"]),
        ((4, 512), (1, 16), "uint8_average", FP32, ["step_of_short_runs"]),
        ((9, 512), (1, 512), "e4m3_fixed", FP16, ["step_of_rows"]),
        ((20003,), (20003,), "uint8_average", BF16, ["step_of_held_tensor"]),
        ((40000,), (40000,), "e4m3_fixed", FP32, ["step_of_held_tensor"]),
        ((300001,), (300001,), "int4_latest", BF16, ["observe_blocks", "step_of_tensor"]),
        ((600, 72), (600, 1), "int4_latest", BF16, ["step_of_held_columns"]),
        ((900, 48), (450, 1), "uint8_average", FP32, ["step_of_held_columns"]),
        ((1024, 16), (512, 1), "e4m3_fixed", FP16, ["step_of_held_columns"]),
        ((64, 16), (64, 1), "int4_latest", BF16, ["observe_columns", "fake_quantize_columns"]),
        ((50, 512), (1, 16), "nvfp4", BF16, ["step_of_held_nvfp4"]),
        ((15, 512), (1, 16), "nvfp4", FP32, ["step_of_held_nvfp4"]),
        ((3, 512), (1, 16), "nvfp4", FP16, ["step_of_held_nvfp4"]),
        (
            (8, 256),
            (1, 32),
            "nvfp4",
            BF16,
            ["observe_short_runs", "largest_magnitudes", "choose_parameters", "fake_quantize_runs"],
        ),
        ((6, 27), (2, 9), "int4_clipped_minval", FP32, ["observe_blocks", "fake_quantize_any"]),
    ],
)
def test_step(
    recorded: Recorded, shape: Any, block: Any, step: str, dtype: torch.dtype, kernels: list[str]
) -> None:
    (chosen,) = [each for each in STEPS if each.name == step]
    config = QuantConfig(block_size=block, **chosen.config)
    grid = [size // part for size, part in zip(shape, block, strict=True)]
    generator = torch.Generator().manual_seed(3)
    low, high = ((torch.rand(grid, generator=generator) * sign).to(dtype) for sign in (-1, 1))
    names = ["output", "mask", "scale", "zero point", "minimum", "running minimum", "running maximum"]
    for special in (False, True):
        x = values_of(shape, dtype, special)
        state = [torch.zeros(grid), torch.zeros(grid, dtype=torch.int32), torch.zeros(grid), low, high]
        state = [value.clone() for value in state]
        recorded.names.clear()
        found = recorded("observe_and_fake_quantize_", x, *state, True, config.packed(), True)
        assert [re.search(r"cuda\d+([a-z][a-z_0-9]*)I", name)[1] for name in recorded.names] == kernels
        wanted = reference_step(x, low, high, config, True)
        for got, value, name in zip((*found, *state), wanted, names, strict=True):
            assert_same_bits(got, value, name)
