"""Budgets for the machine code of the CUDA C++ kernels, and how it is counted."""

import pytest

pytest.importorskip("triton")  # its wheel has the disassembler

from benchmarks.gpu_model import cuda

LOOP = """
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P1 FADD R4, R4, R5 ;
.L_x_2:
        /*0030*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0040*/               @P0 BRA `(.L_x_2) ;
        /*0050*/                   NOP ;
        /*0060*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0070*/              @!P2 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3) ;
"""


def test_the_main_loop_without_those_inside() -> None:
    assert cuda._main_loop(LOOP) == ["LDG.E.128", "FADD", "STG.E.128", "BRA"]


# Beyond the budget: what is looked up for a pack of its own, or for columns, has fewer elements to share; so
# have zero points that are chosen for a short block.
MORE = {
    "forward": {"blocks of 8": 8, "blocks of 16": 4, "columns": 3, "rows, blocks of 32": 1},
    "backward": {"in place": 1},
    "step": {"fp8": 3, "uint8, averaged, blocks of 32": 3},
}
# fp4 is like fp8 but for constants, MXINT8 like MXFP4.
CHOSEN = [case for case in cuda.CASES if not any(name in case.case for name in ("fp4", "MXINT8"))]


@pytest.mark.skipif(cuda.nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", [90, 100])
def test_instructions_an_element(arch: int) -> None:
    found = cuda.examine(CHOSEN, arch)
    over = {}
    for case, kernel in found.items():
        more = next((value for name, value in MORE[case.operation].items() if name in case.case), 0)
        if kernel.instructions > case.budget + more:
            over[case] = kernel.instructions
        # Two blocks of 256 threads at least, and as much under way as memory's latency asks for.
        assert kernel.registers <= 128, case
        assert kernel.in_flight >= 32, case
    assert not over
