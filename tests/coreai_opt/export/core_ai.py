"""Programs for Core AI made of finalized models, what is in them, and what they compute."""

import asyncio
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


def convert(model: nn.Module, args: tuple[Any, ...]) -> Any:
    """The Core AI program of a finalized model, by the steps that Core AI's documentation gives."""
    import coreai_torch

    program = torch.export.export(model.eval(), args, strict=False)
    program = program.run_decompositions(coreai_torch.get_decomp_table())
    converter = coreai_torch.TorchConverter(mode=coreai_torch.TorchConverter.Mode.DEBUG)
    names = [f"x{i}" for i in range(len(args))]
    converter.add_exported_program(program, input_names=names, output_names=["y"], entrypoint_name="main")
    return converter.to_coreai()


def run(program: Any, args: tuple[torch.Tensor, ...], folder: Path) -> torch.Tensor:
    """What the program computes."""
    return _run(program.save_asset(folder / "model.aimodel"), {f"x{i}": arg for i, arg in enumerate(args)})


def run_program(path: Path, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a program in a file computes."""
    from coreai.authoring import AIModelAsset

    return _run(AIModelAsset.load(path), inputs)


def _run(asset: Any, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    import coreai.runtime

    async def call() -> Any:
        async with asset.executable() as executable:
            function = executable.load_function("main")
            inputs = {name: coreai.runtime.NDArray(tensor) for name, tensor in tensors.items()}
            return await function(inputs=inputs)

    result = asyncio.run(call())
    output = next(iter(result.values())) if isinstance(result, Mapping) else result[0]
    return torch.from_numpy(output.numpy().copy())


def operations(program: Any) -> Counter[str]:
    """How often each operation of Core AI is in the program."""
    found: Counter[str] = Counter()

    def walk(operation: Any) -> None:
        if operation.name.startswith("coreai."):
            found[operation.name.removeprefix("coreai.")] += 1
        for region in operation.regions:
            for block in region:
                for each in block:
                    walk(each.operation)

    walk(program._module._mlir_module.operation)
    return found


def constants(program: Any) -> Counter[str]:
    """The types of the program's constants, as ``32x64xsi8``."""
    found: Counter[str] = Counter()

    def walk(operation: Any) -> None:
        if operation.name == "coreai.constant":
            for result in operation.results:
                match = re.search(r"tensor<([^,>]*)", str(result.type))
                found[match[1] if match else str(result.type)] += 1
        for region in operation.regions:
            for block in region:
                for each in block:
                    walk(each.operation)

    walk(program._module._mlir_module.operation)
    return found
