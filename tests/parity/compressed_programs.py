"""Core AI programs with compressed weights, and what is in them. The same file runs on both packages."""

import logging
from collections.abc import Callable
from typing import Any

import coreai_torch
import ml_dtypes
import numpy as np
import torch
from coreai._compiler.ir import DenseElementsAttr
from torch import Tensor, nn

from coreai_opt.coreai_utils import (
    CompressionGranularity,
    DType,
    QScheme,
    palettize_weights,
    quantize_weights,
    sparsify_weights,
)

from .program_resources import resources

__all__ = ["CASES", "MODELS", "answer", "build", "describe", "run"]


class Linear(nn.Module):
    """One product with a weight of 32 x 64."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x)


class Large(nn.Module):
    """A product with enough weights for exact clustering in Apple's package."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(160, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x)


class Mixed(nn.Module):
    """Weights of all kinds: only those of the convolution and the embedding are compressed."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(16, 16, 3, groups=2, bias=False)
        self.e = nn.Embedding(64, 32)
        self.ct = nn.ConvTranspose2d(16, 16, 3, bias=False)
        self.k = nn.Parameter(torch.randn(40, 40))

    def forward(self, x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        return self.c(x), self.e(i), self.ct(x), self.k + 1


class Products(nn.Module):
    """Weights as first and second operand, transposed and not, and one that is read in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(48, 40))
        self.b = nn.Parameter(torch.randn(40, 48))
        self.c = nn.Parameter(torch.randn(40, 40))
        self.conv = nn.Conv2d(32, 32, 3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (
            self.a @ x,
            x.T @ self.b,
            self.b.T @ x,
            x.T @ self.c,
            self.c @ x,
            self.conv(y),
        )


def _half() -> nn.Module:
    return Linear().half()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "linear": (Linear, lambda: (torch.randn(1, 64),)),
    "half": (_half, lambda: (torch.randn(1, 64).half(),)),
    "large": (Large, lambda: (torch.randn(1, 160),)),
    "mixed": (Mixed, lambda: (torch.randn(1, 16, 5, 5), torch.tensor([[1, 2]]))),
    "products": (Products, lambda: (torch.randn(40, 3), torch.randn(1, 32, 5, 5))),
}

D, G = DType, CompressionGranularity
Q, P, S = quantize_weights, palettize_weights, sparsify_weights
ONE = {"num_kmeans_workers": 1}
CASES: dict[str, tuple[str, Any, tuple[Any, ...], dict[str, Any]]] = {
    "int8": ("linear", Q, (D.INT8,), {}),
    "int8-asymmetric": ("linear", Q, (D.INT8, QScheme.ASYMMETRIC), {}),
    "uint8": ("linear", Q, (D.UINT8,), {}),
    "uint8-asymmetric": ("linear", Q, (D.UINT8, QScheme.ASYMMETRIC), {}),
    "int4-blocks": ("linear", Q, (D.INT4,), {"granularity": G.PER_BLOCK}),
    "uint4-asymmetric-blocks": (
        "linear",
        Q,
        (D.UINT4, QScheme.ASYMMETRIC),
        {"granularity": G.PER_BLOCK, "block_size": 16},
    ),
    "int8-tensor": ("linear", Q, (D.INT8,), {"granularity": G.PER_TENSOR}),
    "int2": ("linear", Q, (D.INT2,), {}),
    "uint2": ("linear", Q, (D.UINT2,), {}),
    "fp8": ("linear", Q, (D.FP8_E4M3FN,), {}),
    "fp8-e5m2": ("linear", Q, (D.FP8_E5M2,), {"granularity": G.PER_TENSOR}),
    "fp4": ("linear", Q, (D.FP4_E2M1FN,), {"granularity": G.PER_BLOCK}),
    "fp8-power-of-two": (
        "linear",
        Q,
        (D.FP8_E4M3FN,),
        {"granularity": G.PER_BLOCK, "scale_dtype": D.FP8_E8M0FNU},
    ),
    "threshold-2048": ("linear", Q, (D.INT8,), {"weight_num_threshold": 2048}),
    "threshold-2047": ("linear", Q, (D.INT8,), {"weight_num_threshold": 2047}),
    "block-7": ("linear", Q, (D.INT8,), {"granularity": G.PER_BLOCK, "block_size": 7}),
    "half-int8": ("half", Q, (D.INT8,), {}),
    "half-asymmetric": ("half", Q, (D.UINT4, QScheme.ASYMMETRIC), {"granularity": G.PER_BLOCK}),
    "half-fp8": ("half", Q, (D.FP8_E4M3FN,), {}),
    "half-sparse": ("half", S, (0.5,), {}),
    "mixed-int8": ("mixed", Q, (D.INT8,), {}),
    "mixed-int4-blocks": ("mixed", Q, (D.INT4,), {"granularity": G.PER_BLOCK, "block_size": 8}),
    "mixed-sparse": ("mixed", S, (0.5,), {}),
    "products-int8": ("products", Q, (D.INT8,), {}),
    "products-int4-blocks": ("products", Q, (D.INT4,), {"granularity": G.PER_BLOCK, "block_size": 8}),
    "products-sparse-blocks": ("products", S, (0.5,), {"block_size": 4}),
    "products-nm": ("products", S, (None,), {"n_m_ratio": (1, 4)}),
    "palettes-8": ("large", P, (None, 8), ONE),
    "palettes-2": ("large", P, (None, 2), ONE),
    "palettes-4": ("large", P, (None, 4), ONE),
    "palettes-exact-values": ("large", P, (None, 4), {**ONE, "enable_fast_kmeans_mode": False}),
    "palettes-coarse": ("large", P, (None, 6), {**ONE, "rounding_precision": 2}),
    "palettes-int8": ("large", P, (D.INT8, 4), ONE),
    "palettes-fp8": ("large", P, (D.FP8_E4M3FN, 4), ONE),
    "sparse": ("linear", S, (0.5,), {}),
    "sparse-0.29": ("linear", S, (0.29,), {}),
    "sparse-0": ("linear", S, (0.0,), {}),
    "sparse-1": ("linear", S, (1.0,), {}),
    "sparse-blocks": ("linear", S, (0.5,), {"block_size": 4}),
    "sparse-uneven-blocks": ("linear", S, (0.3,), {"block_size": 5}),
    "sparse-2:4": ("linear", S, (None,), {"n_m_ratio": (2, 4)}),
    "sparse-1:3": ("linear", S, (None,), {"n_m_ratio": (1, 3)}),
    "sparse-0:4": ("linear", S, (None,), {"n_m_ratio": (0, 4)}),
    "sparse-20:40": ("linear", S, (None,), {"n_m_ratio": (20, 40)}),
    "sparse-int8": ("linear", S, (0.5,), {"quantize_dtype": D.INT8}),
    "sparse-fp8": ("linear", S, (0.5,), {"quantize_dtype": D.FP8_E4M3FN}),
    "sparse-all-int8": ("linear", S, (1.0,), {"quantize_dtype": D.INT8}),
}


def build(name: str) -> Any:
    """The program of a model."""
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    program = torch.export.export(make().eval(), inputs())
    converter = coreai_torch.TorchConverter()
    converter.add_exported_program(program.run_decompositions(coreai_torch.get_decomp_table()))
    return converter.to_coreai()


def run(name: str) -> Any:
    """The compressed program of a case."""
    model, function, args, kwargs = CASES[name]
    return function(build(model), *args, **kwargs)


def _operations(root: Any) -> Any:
    for region in root.regions:
        for block in region.blocks:
            for op in block.operations:
                yield op.operation
                yield from _operations(op.operation)


_TYPES = {
    "f32": np.float32,
    "f16": np.float16,
    "f8E4M3FN": ml_dtypes.float8_e4m3fn,
    "f8E5M2": ml_dtypes.float8_e5m2,
    "f8E8M0FNU": ml_dtypes.float8_e8m0fnu,
}


def _constant(op: Any, stored: dict[str, memoryview]) -> Any:
    """The values of a constant, or its bytes where they are packed."""
    attribute, kind = op.attributes["value"], op.results[0].type
    text = str(attribute)[:200]
    element = str(kind.element_type)
    if "dense_resource<" in text:
        raw = bytes(stored[text.split("dense_resource<")[1].split(">")[0]])
        if element in _TYPES:
            return _short(np.frombuffer(raw, _TYPES[element]).astype(np.float32))
        return raw.hex()
    # For other types the bindings end the process.
    if element in ("f32", "f64", "si8", "ui8", "si32", "ui32"):
        return _short(np.array(DenseElementsAttr(attribute)).astype(np.float64).reshape(-1))
    if "dense<" in text and DenseElementsAttr(attribute).is_splat and element in _TYPES:
        return _short(np.full(1, float(text.split("dense<")[1].split(">")[0])))
    return str(attribute)


def _short(values: np.ndarray) -> list[float]:
    """One value instead of many equal ones: whether they are stored once is not compared."""
    return values[:1].tolist() if len(values) and (values == values[0]).all() else values.tolist()


def describe(program: Any) -> list[dict[str, Any]]:
    """The operations that a result depends on, in order, with types and operands; constants by value."""
    module = program._module._mlir_module
    stored = resources(module)
    ops = list(_operations(module.operation))
    used = [op for op in ops if op.name != "coreai.constant" or list(op.results[0].uses)]
    operations = [op for op in used if op.name not in ("coreai.graph", "coreai.constant")]
    names: dict[str, Any] = {
        str(op.results[0].get_name()): index for index, op in enumerate(operations) if list(op.results)
    }
    for op in used:
        if op.name == "coreai.constant":
            names[str(op.results[0].get_name())] = (str(op.results[0].type), _constant(op, stored))
    return [
        {
            "name": op.name,
            "types": [str(result.type) for result in op.results],
            "operands": [names.get(str(operand.get_name()), "input") for operand in op.operands],
        }
        for op in operations
    ]


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """The description of each case's program."""
    logging.disable(logging.WARNING)
    return {name: describe(run(name)) for name in CASES}
