"""Core ML models made of finalized ones, and what is in them."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn


def convert(model: nn.Module, args: tuple[Tensor, ...], target: str = "iOS18", **options: Any) -> Any:
    """The Core ML model of a finalized one."""
    import coremltools as ct

    traced = torch.jit.trace(model.eval(), args)
    return ct.convert(
        traced,
        inputs=[ct.TensorType(shape=arg.shape) for arg in args],
        minimum_deployment_target=getattr(ct.target, target),
        **options,
    )


def operations(model: Any) -> Counter[str]:
    """How often each operation is in the model, without plain constants and casts."""
    found = Counter(each.op_type for each in model._mil_program.functions["main"].operations)
    return Counter({name: count for name, count in found.items() if name not in ("const", "cast")})


def constants(model: Any, op_type: str) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    """Type and shape of each constant operand of the operations of a type."""
    found = []
    for operation in model._mil_program.functions["main"].find_ops(op_type=op_type):
        values = {}
        for name, operand in operation.inputs.items():
            if getattr(operand, "val", None) is not None:
                values[name] = (_type_name(operand), tuple(getattr(operand.val, "shape", ())))
        found.append(values)
    return found


def _type_name(operand: Any) -> str:
    from coremltools.converters.mil.mil import types

    return types.builtin_to_string(operand.dtype)


def weights(model: Any) -> list[Tensor]:
    """The weights that operations of the network read, decompressed."""
    import coremltools as ct

    dense = ct.optimize.coreml.decompress_weights(model)
    operations = dense._mil_program.functions["main"].operations
    read = [each.weight.val for each in operations if each.op_type in ("linear", "conv")]
    return [torch.from_numpy(value.copy()).float() for value in read]
