"""Core AI programs: ``.aimodel`` folders."""

import asyncio
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from coreai_opt.casting import cast_to_16_bit_precision
from coreai_opt.export.coreai import require_operators
from coreai_opt.export.files import Job, require_space

__all__ = ["check", "run", "write"]

# The converter tells indices from tables by these words in the names of a program's inputs.
_INDICES, _TABLE = "indices", "lut"


def check(job: Job) -> None:
    """Raise unless the program can be converted, as far as that is known before.

    Raises:
        ImportError: Core AI's packages are not installed.
        ValueError: an option is unknown, or arguments are no tensors.
    """
    require_operators()
    if job.options:
        raise ValueError(f"there are no options {sorted(job.options)} for .aimodel")
    job.require_tensors()


def write(job: Job, path: Path) -> None:
    """Convert the model, finalized for Core AI, and write it.

    Raises:
        OSError: there is no space for it. The converter would end the process.
    """
    require_space(path.parent, job.model)
    coreai_torch = importlib.import_module("coreai_torch")
    program = torch.export.export(job.model, job.args, dynamic_shapes=job.dynamic_shapes, strict=False)
    program = program.run_decompositions(coreai_torch.get_decomp_table())
    if job.half:
        program = cast_to_16_bit_precision(program)
    _rename_palettes(program)
    converter = coreai_torch.TorchConverter(mode=coreai_torch.TorchConverter.Mode.RELEASE)
    converter.add_exported_program(
        program, input_names=job.input_names, output_names=job.output_names, entrypoint_name="main"
    )
    converter.to_coreai().save_asset(path)


def _rename_palettes(program: ExportedProgram) -> None:
    """Let the inputs that hold palettes have names by which the converter tells them apart.

    Names are those of modules: indices of a layer called "convolution" would pass for a table.
    """
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    for number, node in enumerate(list(program.graph.nodes)):
        target = node.target
        if not (isinstance(target, torch._ops.OpOverload) and target.name() == "coreai::lut_to_dense"):
            continue
        for argument, word in zip(node.args[:2], (_INDICES, _TABLE), strict=True):
            name = f"b_palette_{word}_{number}"
            if argument.name in specs and not argument.name.startswith("b_palette_"):
                spec = specs.pop(argument.name)
                argument.name = argument.target = spec.arg.name = name
                specs[name] = spec
    program.graph_module.recompile()


def run(job: Job, path: Path) -> list[Tensor]:
    """What the written program computes for the example.

    Core AI lowers the program for this machine in a folder for temporary files.
    """
    authoring, runtime = (importlib.import_module(f"coreai.{name}") for name in ("authoring", "runtime"))
    asset = authoring.AIModelAsset.load(path)
    inputs = {}
    for name, tensor in zip(job.input_names, job.inputs, strict=True):
        value = tensor.half() if job.half and tensor.dtype == torch.float32 else tensor
        inputs[name] = runtime.NDArray(value.int() if value.dtype == torch.int64 else value)

    async def call() -> Any:
        async with asset.executable() as executable:
            return await executable.load_function("main")(inputs=inputs)

    result = asyncio.run(call())
    found = [result[name] for name in job.output_names] if isinstance(result, Mapping) else list(result)
    return [torch.from_numpy(each.numpy().copy()) for each in found]
