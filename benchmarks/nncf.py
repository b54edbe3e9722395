"""NNCF's own torch operations as contenders, where the folder ``NNCF_PATH`` holds NNCF 2.13.

NNCF and the packages that it imports, apart from the environment::

    pip install --no-deps --target FOLDER nncf==2.13.0 attrs jsonschema jsonschema-specifications jstyleson \\
        natsort networkx==3.3 openvino-telemetry pandas psutil pydot pyparsing python-dateutil pytz \\
        referencing rpds-py six tabulate tzdata
    CXX=/nonexistent NNCF_PATH=FOLDER python -m benchmarks --op learnable_range sampled_mask --dtypes fp32

Its torch fallback is timed: with ``CXX`` set to a compiler that does not exist, its extension is not built.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["contender", "random_mask", "symmetric_range"]

_VARIABLE = "NNCF_PATH"


def contender(make: Callable[[], Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """``{"nncf": make()}``, or nothing without the variable.

    Raises:
        FileNotFoundError: the folder has no package ``nncf``.
    """
    folder = os.environ.get(_VARIABLE)
    if not folder:
        return {}
    if not (Path(folder) / "nncf").is_dir():
        raise FileNotFoundError(f"{_VARIABLE} must be a folder with the package nncf; got {folder!r}")
    if folder not in sys.path:
        sys.path.append(folder)  # at the end: what is installed here counts first
    return {"nncf": make()}


def symmetric_range(x: Tensor, span: Tensor, grad: Tensor) -> Callable[[], object]:
    """Forward and backward of 8-bit symmetric quantization with a learned scale."""
    from nncf.torch.quantization.quantize_functions import symmetric_quantize

    def train() -> None:
        output = symmetric_quantize(x, 256, -128, 127, span, 1e-16)
        torch.autograd.grad(output, (x, span), grad)

    train()
    return train


def random_mask(weight: Tensor, grad: Tensor) -> Callable[[], object]:
    """Forward and backward of a trained layer of RB sparsity."""
    from nncf.torch.sparsity.rb.layers import RBSparsifyingWeight

    layer = RBSparsifyingWeight(list(weight.shape), frozen=False).train()
    logits = list(layer.parameters())

    def train() -> None:
        torch.autograd.grad(layer(weight), (weight, *logits), grad)

    train()
    return train
