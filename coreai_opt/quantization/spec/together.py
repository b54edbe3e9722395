"""Many fake quantizers at once, for models of many small weights."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from coreai_kernels.ops import foreach
from coreai_opt.quantization.spec._plan import Plan, plan_for, state_for
from coreai_opt.quantization.spec._state import is_shaped
from coreai_opt.quantization.spec.errors import _BlockSizeMismatchError
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["HOOKS", "Task", "is_hooked", "launch_of", "launches", "simulate_together", "task_of"]

# Elements of a tensor that is worth a launch of its own.
_LARGE = 1 << 17
# Elements of a launch. The gradients of its tensors are kept until the last has come: this bounds the memory.
_MOST = 1 << 21

# Where a module keeps those who listen to its calls.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# What the tensors of a launch have in common, and a tensor's state or parameters with its blocks.
Setting = tuple[Any, ...]
Task = tuple[Setting, tuple[Tensor | None, ...], tuple[int, ...]]


def simulate_together(simulators: Sequence[FakeQuantizeImplBase], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each simulator's forward on its tensor, with few launches for the small tensors.

    Outputs, gradients, observed state, warnings and errors are those of ``simulator(tensor)``, one after the
    other. Small tensors whose simulators have the same settings share a launch and a node of the autograd
    graph, whatever their shapes and blocks; what cannot be shared is simulated singly: large tensors, the
    first observation, subclasses with methods of their own, hooks, a simulator that is there twice.

    Args:
        simulators: fake quantizers, switched on or off.
        tensors: one for each.

    Returns:
        One tensor for each, none of which shares memory with another.

    Raises:
        ValueError: the lengths differ; besides, whatever a simulator raises.
    """
    if len(simulators) != len(tensors):
        raise ValueError(
            f"simulators and tensors must have one length; got {len(simulators)} and {len(tensors)}"
        )
    if torch.compiler.is_compiling() or _has_any_global_hook():
        return [simulator(tensor) for simulator, tensor in zip(simulators, tensors, strict=True)]
    outputs: list[Any] = [None] * len(tensors)
    groups: dict[Setting, list[tuple[int, Task]]] = {}
    singles: list[int] = []
    seen: set[int] = set()
    for i, (simulator, tensor) in enumerate(zip(simulators, tensors, strict=True)):
        calculator = id(simulator._modules["qparams_calculator"])
        task = None if calculator in seen else task_of(simulator, tensor)
        seen.add(calculator)
        if task is None:
            singles.append(i)
        else:
            groups.setdefault(task[0], []).append((i, task))
    for setting, members in groups.items():
        for launch in launches(members, tensors):
            found = _run(setting, [tensors[i] for i, _ in launch], [task for _, task in launch])
            for (i, _), output in zip(launch, found, strict=True):
                outputs[i] = output
    for i in singles:
        outputs[i] = simulators[i](tensors[i])
    return outputs


def task_of(simulator: FakeQuantizeImplBase, tensor: Tensor) -> Task | None:
    """What the fused operators have to do for the simulator; None if its own forward has to."""
    flags = simulator._flags
    flags.update(simulator._buffers)
    if flags.disabled or not flags.fake_quant or tensor.numel() >= _LARGE or is_hooked(simulator):
        return None
    try:
        plan = plan_for(simulator, tensor)
    except _BlockSizeMismatchError:
        return None
    if not plan.is_built_in:
        return None
    calculator: Any = simulator._modules["qparams_calculator"]
    scale = calculator._buffers.get("scale")
    # The first observation gives the buffers their shape, which no error further down the list should leave
    # without values.
    if scale is not plan.state[0] and (scale is None or not is_shaped(scale)):
        return None
    if flags.observe or plan.is_stateless:
        return _step_of(plan, calculator, tensor)
    row = plan.select(*simulator.calculate_qparams())
    return (False, plan.values[1:], *_kinds(row)), row, plan.block_size


def _step_of(plan: Plan, calculator: Any, tensor: Tensor) -> Task | None:
    if plan.step is None:
        return None
    found = state_for(plan, calculator, tensor)
    if found is None:
        return None
    state, has_running = found
    if state is not plan.state:
        return (True, plan.step[1:], *_kinds(state), has_running), state, plan.block_size
    if plan.setting is None:
        plan.setting = (True, plan.step[1:], *_kinds(state), has_running)
    return plan.setting, state, plan.block_size


def _kinds(row: tuple[Tensor | None, ...]) -> tuple[bool, ...]:
    return tuple([value is None for value in row])


def is_hooked(simulator: FakeQuantizeImplBase) -> bool:
    """Whether somebody listens to the simulator's calls, so that they must take place."""
    own = simulator.__dict__
    return any(map(own.__getitem__, HOOKS))


def launches(members: list[tuple[int, Task]], tensors: Sequence[Tensor]) -> Iterator[list[tuple[int, Task]]]:
    """The members in order, in pieces of limited size."""
    piece: list[tuple[int, Task]] = []
    size = 0
    for member in members:
        piece.append(member)
        size += tensors[member[0]].numel()
        if size >= _MOST:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _run(setting: Setting, tensors: list[Tensor], tasks: list[Task]) -> list[Tensor]:
    rows = [row for _, row, _ in tasks]
    blocks = [block_size for _, _, block_size in tasks]
    observes, config = setting[:2]
    if observes:
        return foreach.apply_step(tensors, rows, setting[-1], blocks, config)
    return foreach.apply(tensors, rows, blocks, *config)


def launch_of(tasks: list[Task]) -> foreach.Launch:
    """The operator for tensors whose tasks have one setting; whoever calls it sees that it takes them."""
    setting = tasks[0][0]
    rows = [row for _, row, _ in tasks]
    blocks = [block_size for _, _, block_size in tasks]
    observes, config = setting[:2]
    if observes:
        return foreach.launch_step(rows, setting[-1], blocks, config)
    return foreach.launch(rows, blocks, *config)
