"""The interpreter of PTX: single instructions with known results, and what it must not let pass."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.emulation.ptx import Fault, Refused, launch, machine
from tests.emulation.ptx.values import fma

HEADER = """.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(.param .u64 .ptr .global .align 16 kernel_param_0, .param .u32 kernel_param_1)
{
.reg .pred %p<9>;
.reg .b16 %h<9>;
.reg .b32 %r<20>;
.reg .b64 %d<9>;
ld.param.u64 %d0, [kernel_param_0];
ld.param.u32 %r0, [kernel_param_1];
mov.u32 %r1, %tid.x;
mad.wide.u32 %d1, %r1, 4, %d0;
"""


def run(body: str, output: Tensor, number: int = 0, threads: int = 32, shared: int = 0) -> Tensor:
    """Run ``body``: %d1 has the address of the thread's output, %r0 the number, %r1 the thread."""
    launch(HEADER + body + "\nret;\n}", 1, threads, [output, np.uint32(number)], shared=shared)
    return output


def word(body: str, *inputs: float, dtype: torch.dtype = torch.float32) -> float:
    """What ``body`` leaves in %r9, of inputs in %r2, %r3, %r4."""
    for register, value in enumerate(inputs, 2):
        bits = np.float32(value).view(np.uint32) if isinstance(value, float) else value & 0xFFFFFFFF
        body = f"mov.b32 %r{register}, {bits};\n{body}"
    return run(f"{body}\nst.global.b32 [%d1], %r9;", torch.zeros(32, dtype=dtype))[0].item()


def test_a_fused_multiply_add_rounds_once() -> None:
    x = 1 + 2.0**-12
    assert word("fma.rn.f32 %r9, %r2, %r3, %r4;", x, x, -1.0 - 2.0**-11) == 2.0**-24
    assert word("mul.rn.f32 %r9, %r2, %r3;\nadd.rn.f32 %r9, %r9, %r4;", x, x, -1.0 - 2.0**-11) == 0.0
    # In float64 the sum is a tie between two float32 numbers, which the lost part decides.
    near = np.float32(2.0**-60)
    for sign in (-1, 1):
        found = fma(
            np.array([1.0], np.float32), np.array([1 + 2.0**-23], np.float32), np.array([sign * near])
        )
        assert found == np.float32(1 + 2.0**-23)
    halves = [np.array([value], np.float32) for value in (1 + 2.0**-12, 1 - 2.0**-12, 2.0**24)]
    assert fma(*halves) == np.float32(2.0**24)  # below the tie at 2**24 + 1
    above = [np.array([value], np.float32) for value in (1 + 2.0**-12, 1 + 2.0**-12, 2.0**24)]
    assert fma(*above) == np.float32(2.0**24 + 2)


def test_fused_multiply_adds_against_whole_numbers() -> None:
    """Python's integers, scaled, know the exact result."""
    generator = np.random.default_rng(0)
    for _ in range(300):
        mantissas = [int(m) for m in generator.integers(-(2**24), 2**24, 3)]
        shift = int(generator.integers(0, 50))
        a, b = (np.array([m], np.float32) for m in mantissas[:2])
        c = np.array([np.ldexp(mantissas[2], shift)], np.float32)
        exact = mantissas[0] * mantissas[1] + mantissas[2] * 2**shift
        size = max(abs(exact).bit_length() - 24, 0)
        kept, rest = divmod(abs(exact), 1 << size)
        half = (1 << size) // 2
        kept += size > 0 and (rest > half or (rest == half and kept % 2 == 1))
        assert fma(a, b, c)[0] == np.float32(float(kept << size) * (1 if exact >= 0 else -1))


def test_conversions_round() -> None:
    assert (
        word("cvt.rn.bf16x2.f32 %r9, %r2, %r3;", 1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, dtype=torch.int32)
        == 0x3F803F82
    )
    assert word("cvt.rzi.s32.f32 %r9, %r2;", -3.7, dtype=torch.int32) == -3
    assert word("cvt.rni.s32.f32 %r9, %r2;", 2.5, dtype=torch.int32) == 2
    assert word("cvt.rzi.s32.f32 %r9, %r2;", 3e10, dtype=torch.int32) == 2**31 - 1
    assert word("cvt.rzi.s32.f32 %r9, %r2;", float("nan"), dtype=torch.int32) == 0
    assert word("cvt.rn.f32.s32 %r9, %r2;", 2**24 + 1) == 2.0**24
    assert word("cvt.rni.f32.f32 %r9, %r2;", 2.5) == 2.0
    assert np.signbit(word("cvt.rni.f32.f32 %r9, %r2;", -0.25))


def test_reciprocals_are_off_by_a_unit_at_most() -> None:
    for x in (1.5, 3.0, 0.7, -5.0):
        nearest = np.float32(1) / np.float32(x)
        found = np.float32(word("rcp.approx.ftz.f32 %r9, %r2;", x))
        assert abs(int(found.view(np.int32)) - int(nearest.view(np.int32))) <= 1
    assert word("rcp.approx.ftz.f32 %r9, %r2;", 0.0) == float("inf")


def test_16_bit_pairs() -> None:
    words = {"%r2": 0x40003F80, "%r3": 0x3F807FC0}  # bfloat16: (1, 2) and (NaN, 1), the lower half first
    moves = "".join(f"mov.b32 {register}, {bits};\n" for register, bits in words.items())
    assert word(f"{moves}min.NaN.bf16x2 %r9, %r2, %r3;", dtype=torch.int32) == 0x3F807FFF
    assert word(f"{moves}max.bf16x2 %r9, %r2, %r3;", dtype=torch.int32) == 0x40003F80
    fused = "mov.b32 %r4, 0x80008000;\nfma.rn.bf16x2 %r9, %r2, %r2, %r4;"
    assert word(moves + fused, dtype=torch.int32) == 0x40803F80
    halves = "mov.b32 %r2, 0x40003C00;\nmov.b32 %r4, 0x80008000;\nfma.rn.f16x2 %r9, %r2, %r2, %r4;"
    assert word(halves, dtype=torch.int32) == 0x44003C00


def test_registers_of_a_scope() -> None:
    body = (
        "mov.u32 %r2, 5;\n{ .reg .pred p; setp.ne.u32 p, %r2, 0; @p or.b32 %r2, %r2, 8; }\nmov.b32 %r9, %r2;"
    )
    assert word(body, dtype=torch.int32) == 13


def test_subnormals_are_flushed_only_where_an_instruction_says_so() -> None:
    assert word("add.rn.f32 %r9, %r2, %r3;", 1e-40, 0.0) > 0
    assert word("add.rn.ftz.f32 %r9, %r2, %r3;", 1e-40, 0.0) == 0


def test_nan_in_minima() -> None:
    assert word("min.f32 %r9, %r2, %r3;", float("nan"), 2.0) == 2.0
    assert np.isnan(word("min.NaN.f32 %r9, %r2, %r3;", float("nan"), 2.0))
    assert np.signbit(word("min.f32 %r9, %r2, %r3;", 0.0, -0.0))
    assert not np.signbit(word("max.f32 %r9, %r2, %r3;", -0.0, 0.0))


def test_numbers_keep_their_bits() -> None:
    assert word("mov.b32 %r9, 0f3FC00000;") == 1.5
    assert word("mov.b64 %d3, 0d3FF8000000000000;\nmov.b64 {%r8, %r9}, %d3;", dtype=torch.int32) == 0x3FF80000


def test_pairs_of_numbers() -> None:
    body = """
    mov.b64 %d3, {%r2, %r3};
    mov.b64 %d4, {%r3, %r4};
    fma.rn.f32x2 %d5, %d3, %d4, %d3;
    mov.b64 {%r8, %r9}, %d5;
    sub.rn.f32 %r9, %r9, %r8;"""
    assert word(body, 2.0, 3.0, 5.0) == (3.0 * 5 + 3) - (2.0 * 3 + 2)


def test_integers() -> None:
    assert word("div.s32 %r9, %r2, %r3;", -7, 2, dtype=torch.int32) == -3
    assert word("rem.s32 %r9, %r2, %r3;", -7, 2, dtype=torch.int32) == -1
    assert word("mul.hi.u32 %r9, %r2, %r3;", 1 << 31, 6, dtype=torch.int32) == 3
    assert word("prmt.b32 %r9, %r2, %r3, 0x6503U;", 0x44332211, 0x88776655, dtype=torch.int32) == 0x77661144
    assert word("bfe.s32 %r9, %r2, 4, 4;", 0xF0, dtype=torch.int32) == -1
    assert word("shr.u32 %r9, %r2, 40;", 0xF0, dtype=torch.int32) == 0
    assert word("lop3.b32 %r9, %r2, %r3, %r4, 0xca;", 0xF0, 0xAA, 0x55, dtype=torch.int32) == 0xA5


def test_threads_part_and_meet() -> None:
    body = """
    setp.lt.u32 %p1, %r1, 5;
    @%p1 bra $A;
    mov.b32 %r9, 100;
    bra.uni $B;
$A:
    mov.b32 %r9, %r1;
$L:
    add.s32 %r9, %r9, 10;
    setp.lt.s32 %p2, %r9, 30;
    @%p2 bra $L;
$B:
    shfl.sync.bfly.b32 %r9, %r9, 1, 31, -1;
    st.global.b32 [%d1], %r9;"""
    found = run(body, torch.zeros(32, dtype=torch.int32)).tolist()
    alone = [30, 31, 32, 33, 34] + [100] * 27
    assert found == [alone[i ^ 1] for i in range(32)]


def test_barriers_and_votes() -> None:
    body = """
    mov.b32 %r2, memory;
    mad.lo.s32 %r3, %r1, 4, %r2;
    st.shared.b32 [%r3], %r1;
    bar.sync 0;
    xor.b32 %r4, %r1, 63;
    mad.lo.s32 %r3, %r4, 4, %r2;
    ld.shared.b32 %r9, [%r3];
    setp.gt.u32 %p1, %r9, 60;
    vote.sync.ballot.b32 %r10, %p1, -1;
    add.s32 %r9, %r9, %r10;
    st.global.b32 [%d1], %r9;"""
    found = run(body, torch.zeros(64, dtype=torch.int32), threads=64, shared=256).tolist()
    assert found == [63 - i + (7 if i < 32 else 0) for i in range(64)]
    with pytest.raises(Fault, match="without a barrier"):
        run(body.replace("bar.sync 0;", ""), torch.zeros(64, dtype=torch.int32), threads=64, shared=256)


# Each block adds one to a number in memory, waits until all have, and stores what it then finds.
WHOLE_GRID = """
    mov.u32 %r2, %envreg1;
    mov.u32 %r3, %envreg2;
    mov.b64 %d2, {%r3, %r2};
    setp.ne.s64 %p0, %d2, 0;
    @%p0 bra $A;
    trap;
$A:
    setp.ne.s32 %p1, %r1, 0;
    @%p1 bra $B;
    mov.u32 %r5, %ctaid.x;
    mad.wide.u32 %d1, %r5, 4, %d0;
    atom.add.release.gpu.u32 %r4, [%d2], 1;
$L:
    ld.acquire.gpu.u32 %r4, [%d2];
    setp.lt.u32 %p2, %r4, %r0;
    @%p2 bra $L;
    st.global.b32 [%d1], %r4;
$B:
    barrier.sync 0;"""


@pytest.mark.parametrize("reverse", [False, True])
def test_blocks_of_a_whole_grid_wait_for_each_other(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = f"{HEADER}{WHOLE_GRID}\nret;\n}}"
    output = torch.zeros(3, dtype=torch.int32)
    launch(kernel, 3, 64, [output, np.uint32(3)], whole=True, reverse=reverse)
    assert output.tolist() == [3, 3, 3]
    with pytest.raises(Fault, match="stops itself"):
        launch(kernel, 3, 64, [output, np.uint32(3)], reverse=reverse)
    monkeypatch.setattr(machine, "MOST_STEPS", 1000)
    with pytest.raises(Fault, match="does not seem to end"):
        launch(kernel, 3, 64, [output, np.uint32(4)], whole=True)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.global.b32 [%d1+64], %r1;", "outside of the tensors"),
        ("st.global.b32 [%d1+2], %r1;", "multiple of 4"),
        ("setp.lt.u32 %p1, %r1, 5;\n@%p1 bra $A;\nshfl.sync.bfly.b32 %r9, %r9, 1, 31, -1;\n$A:", "elsewhere"),
        ("div.u32 %r9, %r1, %r0;", "division by zero"),
        ("$A:\nbra.uni $A;", "does not seem to end"),
    ],
)
def test_faults(body: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MOST_STEPS", 1000)
    with pytest.raises(Fault, match=message):
        run(body, torch.zeros(32, dtype=torch.int32))


@pytest.mark.parametrize(
    "instruction",
    [
        "div.full.f32 %r9, %r2, %r3",
        "rcp.approx.f32 %r9, %r2",
        "add.f32 %r9, %r2, %r3",
        "add.rz.f32 %r9, %r2, %r3",
        "ex2.approx.f32 %r9, %r2",
        "cp.async.ca.shared.global [%r2], [%d1], 4",
        "mov.b32 %r9, %clock",
    ],
)
def test_what_is_not_known_is_refused(instruction: str) -> None:
    with pytest.raises(Refused, match=r"%r9|cp\.async|%clock"):
        run(f"{instruction};", torch.zeros(32, dtype=torch.int32))


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="takes 2 arguments, not 1"):
        launch(HEADER + "ret;\n}", 1, 32, [torch.zeros(1)])
    with pytest.raises(ValueError, match="has 4 bytes"):
        launch(HEADER + "ret;\n}", 1, 32, [torch.zeros(1), np.uint64(1)])
