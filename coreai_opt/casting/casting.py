"""The casts of a whole program."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import fx
from torch._ops import OpOverload, OpOverloadPacket
from torch.export import ExportedProgram

from coreai_opt.casting import _float16, _int16
from coreai_opt.casting._calibration import overflowing_nodes
from coreai_opt.casting._cleanup import finish, simplify
from coreai_opt.casting._ignored import node_filter

__all__ = ["cast_fp32_to_fp16", "cast_int32_to_int16", "cast_to_16_bit_precision"]

Op = OpOverload | OpOverloadPacket
IgnoredOps = Op | Collection[Op] | Callable[[fx.Node], bool]


def cast_fp32_to_fp16(
    exported_program: ExportedProgram,
    ignored_ops: IgnoredOps | None = None,
    calibration_data: Iterable[Any] | None = None,
) -> ExportedProgram:
    """Compute in float16 what the program computes in float32.

    Parameters, buffers and constants with a finite value beyond 65504 stay in float32, and so do operations
    that read them or have such a number among their arguments. Values smaller than the smallest float16
    number become that number; infinities and arguments from 1e38 on become 65504. Callers give float16 in
    place of float32 inputs afterwards, and get float16 results.

    Args:
        exported_program: is changed in place.
        ignored_ops: operations to keep in float32: an overload or a packet of ``torch.ops``, a collection of
            them, or a function that says so of a node.
        calibration_data: samples to run the program on first: a tensor, a tuple of tensors, or a dict by the
            names of the inputs. What overflows float16 in one of them stays in float32, and so do the
            operations that read it.

    Returns:
        ``exported_program``.

    Raises:
        TypeError: ``exported_program`` is none, or ``ignored_ops``, ``calibration_data`` or a sample is of a
            type that is not listed above.
        ValueError: a sample lacks an input, or has one too many.
    """
    _check_program(exported_program)
    is_ignored = node_filter(ignored_ops)
    overflowing = set() if calibration_data is None else overflowing_nodes(exported_program, calibration_data)
    inserted = _float16.cast(exported_program, lambda node: node in overflowing or is_ignored(node))
    simplify(exported_program.graph, inserted)
    return finish(exported_program)


def cast_int32_to_int16(exported_program: ExportedProgram) -> ExportedProgram:
    """Add, subtract and multiply in int16 what the program's inputs lead to in int32 or int64.

    Indices, stored tensors, and operations with a number as the other operand keep their type. Values are not
    checked: the sums and products must fit int16. Callers give int16 in place of the inputs that take part;
    results are int32.

    Args:
        exported_program: is changed in place.

    Returns:
        ``exported_program``.

    Raises:
        TypeError: ``exported_program`` is none.
    """
    _check_program(exported_program)
    inserted = _int16.cast(exported_program)
    simplify(exported_program.graph, inserted)
    _int16.anchor_views(exported_program.graph)
    return finish(exported_program)


def cast_to_16_bit_precision(
    exported_program: ExportedProgram,
    ignored_ops: IgnoredOps | None = None,
    calibration_data: Iterable[Any] | None = None,
) -> ExportedProgram:
    """:func:`cast_fp32_to_fp16`, then :func:`cast_int32_to_int16`."""
    return cast_int32_to_int16(cast_fp32_to_fp16(exported_program, ignored_ops, calibration_data))


def _check_program(exported_program: Any) -> None:
    if not isinstance(exported_program, ExportedProgram):
        raise TypeError(
            f"exported_program must be an ExportedProgram, the result of torch.export.export; "
            f"got {type(exported_program).__name__}"
        )
