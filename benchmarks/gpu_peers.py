"""What other packages take for the GPU check's cases."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_cases import Case

__all__ = ["modelopts", "torchaos"]

Call = Callable[[], Any] | None


def torchaos(case: Case, operation: str) -> Call:
    """torchao's primitives, of which its own simulators are made: integers, one scale a block."""
    if operation == "backward" or case.zero_point is None or case.scale_format != 0:
        return None
    from torchao.quantization import quant_primitives as ao

    blocks, low, high = tuple(case.block_size), int(case.low), int(case.high)
    if operation == "forward":
        return lambda: ao._fake_quantize_affine(
            case.x, blocks, case.scale, case.zero_point, torch.int8, low, high
        )

    def step() -> Any:
        mapping = ao.MappingType.SYMMETRIC
        scale, zero_point = ao.choose_qparams_affine(case.x, mapping, blocks, torch.int8, low, high)
        return ao._fake_quantize_affine(case.x, blocks, scale, zero_point, torch.int8, low, high)

    return step


def modelopts(case: Case, operation: str) -> Call:
    """ModelOpt's fake quantizers of integers and float8, where it is installed; a step computes the range."""
    if operation == "backward" or importlib.util.find_spec("modelopt") is None:
        return None
    if case.format_name not in ("int8", "int4", "fp8") or case.granularity == "block32":
        return None
    from modelopt.torch.quantization import tensor_quant as theirs  # type: ignore[import-not-found]

    axes = (0, 1) if case.granularity == "tensor" else (1,)
    bits = 4 if case.format_name == "int4" else 8

    def largest() -> Any:
        return case.x.abs().amax(axes, keepdim=True)

    def simulate(amax: Any) -> Any:
        if case.format_name == "fp8":
            return theirs.scaled_e4m3(case.x, amax, None, 4, 3)
        return theirs.fake_tensor_quant(case.x, amax, None, bits)

    if operation == "step":
        return lambda: simulate(largest())
    amax = largest()
    return lambda: simulate(amax)
