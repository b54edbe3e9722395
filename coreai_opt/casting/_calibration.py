"""Which operations leave the range of float16, seen on samples."""

from collections.abc import Iterable, Mapping
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from coreai_opt.casting._float16 import INFINITE, LARGEST
from coreai_opt.casting._nodes import dtype_of
from coreai_opt.casting._stored import user_inputs

__all__ = ["overflowing_nodes"]


def overflowing_nodes(program: ExportedProgram, samples: Iterable[Any]) -> set[fx.Node]:
    """The nodes with a finite result that float16 cannot hold, and those that read such a result.

    Args:
        program: is run, not changed.
        samples: see :func:`coreai_opt.casting.cast_fp32_to_fp16`.

    Raises:
        TypeError, ValueError: see there.
    """
    if isinstance(samples, Tensor | Mapping | str | bytes) or not isinstance(samples, Iterable):
        raise TypeError(
            f"calibration_data must be an iterable of samples, such as a list or a DataLoader; "
            f"got {type(samples).__name__}"
        )
    names = [node.name for node in user_inputs(program)]
    device = next((each.device for each in program.state_dict.values() if isinstance(each, Tensor)), None)
    watcher = _Watcher(program)
    with torch.no_grad():
        for sample in samples:
            arguments = [_moved(value, device) for value in _arguments(sample, names)]
            watcher.run(*watcher.all_arguments(arguments))
    return _with_readers(watcher.overflowing)


def _arguments(sample: Any, names: list[str]) -> list[Any]:
    """The values of a sample in the order of the program's inputs."""
    if isinstance(sample, Mapping):
        missing = [name for name in names if name not in sample]
        if missing:
            raise ValueError(
                f"a sample of calibration_data lacks the inputs {missing}; the program takes {names}"
            )
        return [sample[name] for name in names]
    if isinstance(sample, Tensor):
        sample = (sample,)
    if not isinstance(sample, tuple | list):
        raise TypeError(
            f"a sample of calibration_data must be a tensor, a tuple, a list or a dict; "
            f"got {type(sample).__name__}"
        )
    if len(sample) != len(names):
        raise ValueError(
            f"a sample of calibration_data has {len(sample)} inputs; the program takes {len(names)}: {names}"
        )
    return list(sample)


def _moved(value: Any, device: torch.device | None) -> Any:
    return value.to(device) if isinstance(value, Tensor) and device is not None else value


class _Watcher(fx.Interpreter):
    """Runs a program's graph and notes the nodes that overflow."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program.graph_module)
        self.program = program
        self.overflowing: set[fx.Node] = set()

    def all_arguments(self, user_values: list[Any]) -> list[Any]:
        """The values of all placeholders: stored tensors, and the user's."""
        values = iter(user_values)
        stored = {**self.program.constants, **self.program.state_dict}
        return [
            next(values) if spec.kind == InputKind.USER_INPUT else stored[spec.target or ""]
            for spec in self.program.graph_signature.input_specs
        ]

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and n not in self.overflowing and _overflows(result):
            self.overflowing.add(n)
        return result


def _overflows(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_overflows(each) for each in value)
    if isinstance(value, float):
        return LARGEST < abs(value) < INFINITE
    if isinstance(value, Tensor) and value.is_floating_point():
        magnitude = value.abs()
        return bool(((magnitude > LARGEST) & (magnitude < INFINITE)).any())
    return False


def _with_readers(overflowing: set[fx.Node]) -> set[fx.Node]:
    """The nodes and the float32 ones that read them, also where a node only takes a result out of several."""
    found, pending = set(overflowing), list(overflowing)
    while pending:
        for user in pending.pop().users:
            if user.target is getitem:
                found.add(user)
                pending.append(user)
            elif dtype_of(user) == torch.float32:
                found.add(user)
    return found
