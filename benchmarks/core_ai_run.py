"""One compression of a Core AI program's weights, with whichever `coreai_opt` the process imports."""

import copy
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

__all__ = ["PASSES", "compress_program"]


def _passes() -> dict[str, Callable[[Any], Any]]:
    from coreai_opt.coreai_utils import (
        CompressionGranularity,
        DType,
        palettize_weights,
        quantize_weights,
        sparsify_weights,
    )

    blocks = CompressionGranularity.PER_BLOCK
    return {
        "int8 per channel": lambda p: quantize_weights(p, DType.INT8),
        "int4 in blocks of 32": lambda p: quantize_weights(p, DType.INT4, granularity=blocks, block_size=32),
        "fp8 per channel": lambda p: quantize_weights(p, DType.FP8_E4M3FN),
        "fp4 in blocks of 32": lambda p: quantize_weights(p, DType.FP4_E2M1FN, granularity=blocks),
        "palettes of 4 bits": lambda p: palettize_weights(p, None, 4),
        "half zeros": lambda p: sparsify_weights(p, 0.5),
        "2:4": lambda p: sparsify_weights(p, None, n_m_ratio=(2, 4)),
        "half zeros, int8": lambda p: sparsify_weights(p, 0.5, quantize_dtype=DType.INT8),
    }


# What a program is compressed to. In the worker, the folder of the package comes onto the path later.
PASSES = (
    *("int8 per channel", "int4 in blocks of 32", "fp8 per channel", "fp4 in blocks of 32"),
    *("palettes of 4 bits", "half zeros", "2:4", "half zeros, int8"),
)


@lru_cache(maxsize=1)
def _program(layers: int, width: int) -> Any:
    """A chain of linear layers without biases, as coreai-torch exports it."""
    from coreai_torch import TorchConverter, get_decomp_table

    torch.manual_seed(0)
    chain = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(layers))).eval()
    exported = torch.export.export(chain, (torch.zeros(1, width),)).run_decompositions(get_decomp_table())
    return TorchConverter().add_exported_program(exported).to_coreai()


def compress_program(name: str, layers: int, width: int, threads: int) -> dict[str, float]:
    """Compress a program of ``layers * width ** 2`` weights.

    Args:
        name: one of :data:`PASSES`.

    Returns:
        ``"seconds"`` elapsed and ``"cpu"`` seconds of the processors, without the making of the program.
    """
    torch.set_num_threads(threads)
    compress = _passes()[name]
    program = copy.deepcopy(_program(layers, width))
    elapsed, cpu = time.perf_counter(), time.process_time()
    compress(program)
    return {"seconds": time.perf_counter() - elapsed, "cpu": time.process_time() - cpu}
