"""Torch models as ONNX programs, and ONNX programs as files."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coreai_opt.export.files import written

__all__ = ["DEFAULT_OPSET", "FIRST_OPSET_OF_4_BITS", "exported", "require_onnx", "write_program"]

DEFAULT_OPSET = 20
"""Unless there are 4-bit integers.

From 21 on, ONNX Runtime 1.31 fails to load signed 8-bit inputs, with three axes, of linear layers with
biases: its optimizer makes a QuantizeLinear with a wrong ``output_dtype``, an attribute that 20 lacks.
"""

FIRST_OPSET_OF_4_BITS = 21

# Protocol buffers end at 2 GiB. What is not of weights takes little of it.
_MOST_IN_ONE_FILE = 2_000_000_000


def require_onnx(*packages: str) -> None:
    """ImportError unless the packages are installed."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"ONNX files need the package {package} ({error}): pip install 'coreai-opt-fused[onnx]'"
            ) from error


def exported(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    opset: int,
    input_names: list[str] | None = None,
    output_names: list[str] | None = None,
    dynamic_shapes: Any = None,
) -> Any:
    """The model as an ``onnx_ir.Model``, without what the exporter notes for debugging.

    Raises:
        ImportError: onnx or onnxscript is not installed.
    """
    require_onnx("onnx", "onnxscript")
    with torch.no_grad():
        program: Any = torch.onnx.export(
            model,
            args,
            kwargs=kwargs or None,
            dynamo=True,
            opset_version=opset,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )
    for node in program.model.graph:  # paths of source files
        node.metadata_props.clear()
    return program.model


def write_program(program: Any, path: Path) -> None:
    """Write an ``onnx_ir.Model``, whole or not at all.

    Weights that are too large for one file lie in a second one beside it, ``<name>.data``, which the first
    refers to by its name.

    Raises:
        IsADirectoryError: ``path`` is a folder.
        OSError: it cannot be written.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; an ONNX file is to be written")
    ir = importlib.import_module("onnx_ir")
    size = sum(each.const_value.nbytes for each in program.graph.initializers.values())
    with written(path) as temporary:
        ir.save(program, temporary, external_data=f"{path.name}.data" if size > _MOST_IN_ONE_FILE else None)
