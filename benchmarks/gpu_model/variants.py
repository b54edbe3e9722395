"""The hot operations by compiler, format, blocks and dtype; and how many instructions they may take."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.gpu_model import cuda, triton_code, triton_runs
from benchmarks.gpu_model.cases import DTYPES, FORMATS, SHAPE
from benchmarks.gpu_model.model import Kernel
from benchmarks.gpu_model.names import CUDA, TRITON
from coreai_kernels import RangeUpdate, ScaleFormat

__all__ = ["Variant", "variants"]

# Instructions an element, by the size of elements: what leaves a GPU bound by memory.
BUDGETS = {"forward": {4: 20, 2: 16}, "backward": {4: 6, 2: 6}, "observe and quantize": {4: 24, 2: 20}}
_CHOSEN_BLOCKS = 4096


@dataclass(frozen=True)
class Variant:
    """An operation on certain tensors, as one compiler makes it.

    Attributes:
        operation, case, dtype, compiler: names for the table.
        elements: of the large tensor.
        read, written: bytes of large tensors an element, the least that there can be.
        run: calls the operator, of Triton.
        bodies: its kernels, of CUDA C++.
    """

    operation: str
    case: str
    dtype: str
    compiler: str
    elements: int
    read: float
    written: float
    run: Callable[[], object] | None = None
    bodies: Sequence[cuda.Body] = ()

    @property
    def name(self) -> str:
        """What ``--only`` looks into."""
        return ", ".join(filter(None, (self.operation, self.case, self.dtype, self.compiler)))

    @property
    def budget(self) -> int | None:
        """How many instructions an element may take."""
        sizes = BUDGETS.get(self.operation)
        return sizes and sizes[DTYPES[self.dtype].itemsize]

    def kernels(self, arch: int) -> list[Kernel]:
        """Compile what it launches, and count."""
        if self.run is None:
            return cuda.kernels(self.bodies, arch)
        return triton_code.kernels(self.run, arch, self.elements, self.read, self.written)


def variants() -> Iterator[Variant]:
    """All of them."""
    for dtype in DTYPES:
        yield from _quantization(dtype)
        yield from _others(dtype)
    yield from _choices()


def _pair(
    operation: str,
    case: str,
    dtype: str,
    traffic: tuple[float, float],
    run: triton_runs.Run | None,
    bodies: Sequence[cuda.Body] = (),
) -> Iterator[Variant]:
    """A variant by each compiler that has it."""
    elements = SHAPE[0] * SHAPE[1]
    if bodies:
        yield Variant(operation, case, dtype, CUDA, elements, *traffic, bodies=bodies)
    if run is not None:
        yield Variant(operation, case, dtype, TRITON, elements, *traffic, run=run)


def _quantization(name: str) -> Iterator[Variant]:
    dtype = DTYPES[name]
    size = dtype.itemsize
    traffic = (size, size + 1 / 8)
    for format_name, fmt in FORMATS.items():
        for blocks in fmt.blocks:
            case = f"{format_name}, {blocks}"
            run = triton_runs.forward(fmt, blocks, dtype)
            yield from _pair("forward", case, name, traffic, run, cuda.forward(fmt.format, blocks, size))
            rule = (fmt.scheme, RangeUpdate.MOVING_AVERAGE, fmt.scales)
            run = triton_runs.step(fmt, blocks, dtype)
            yield from _pair(
                "observe and quantize", case, name, traffic, run, cuda.step(fmt.format, blocks, size, rule)
            )
    int8 = FORMATS["int8"]
    rule = (int8.scheme, RangeUpdate.MOVING_AVERAGE, int8.scales)
    longer = cuda.step(int8.format, "rows", size, rule, held=8)
    yield from _pair("observe and quantize", "int8, longer rows", name, traffic, None, longer)
    for format_name, blocks in (("int8", "tensor"), ("int8", "columns"), ("NVFP4", "blocks of 16")):
        fmt = FORMATS[format_name]
        larger = cuda.larger_step(
            fmt.format, blocks, size, (fmt.scheme, RangeUpdate.MOVING_AVERAGE, fmt.scales)
        )
        case = f"{format_name}, {blocks}, larger"
        yield from _pair("observe and quantize", case, name, traffic, None, larger)
    one_by_one = (
        *cuda.observe("rows", size, fmt=int8.format, rule=rule),
        *cuda.forward(int8.format, "rows", size),
    )
    run = triton_runs.observe_then_quantize(int8, "rows", dtype)
    yield from _pair("observe, then quantize", "int8, rows", name, traffic, run, one_by_one)
    for case, in_place in (("", False), ("in place", True)):
        run = triton_runs.backward(dtype, in_place)
        bodies = cuda.backward(size, in_place)
        yield from _pair("backward", case, name, (size + 1 / 8, size), run, bodies)
    for blocks in ("tensor", "rows", "columns", "blocks of 32"):
        run = triton_runs.observe(blocks, dtype)
        yield from _pair("observe", blocks, name, (size, 0), run, cuda.observe(blocks, size))


def _others(name: str) -> Iterator[Variant]:
    dtype = DTYPES[name]
    size = dtype.itemsize
    magnitudes = cuda.largest_magnitudes(size)
    yield from _pair("mask", "largest magnitudes", name, (2 * size, size), None, magnitudes)
    for n, m in ((2, 4), (4, 8)):
        yield from _pair("mask", f"{n}:{m}", name, (size, size), triton_runs.n_of_m(n, m, dtype))
    yield from _pair("sampled mask", "forward", name, (size + 4, size), triton_runs.sampled(dtype, False))
    yield from _pair(
        "sampled mask", "backward", name, (2 * size + 4, size + 4), triton_runs.sampled(dtype, True)
    )
    for bits in (8, 4):
        run = triton_runs.looked_up(bits, dtype)
        yield from _pair("look-up", f"{bits}-bit palette", name, (bits / 8, size), run)
    for blocks in ("rows", "tensor"):
        run = triton_runs.learned(blocks, dtype)
        yield from _pair("learned range, backward", f"int8, {blocks}", name, (2 * size, size), run)


def _choices() -> Iterator[Variant]:
    """Of blocks, which are the elements here."""
    for name in ("int8", "int8 asymmetric", "fp8", "MXFP4", "NVFP4"):
        fmt = FORMATS[name]
        first = cuda.largest_first() if fmt.scales == ScaleFormat.E4M3 else ()
        bodies = (*first, *cuda.choose(fmt.format, fmt.scheme, fmt.scales))
        run = triton_runs.choose(fmt, _CHOSEN_BLOCKS)
        facts = ("choose parameters", name, "fp32")
        yield Variant(*facts, CUDA, _CHOSEN_BLOCKS, 8, 12, bodies=bodies)
        yield Variant(*facts, TRITON, _CHOSEN_BLOCKS, 8, 12, run=run)
