"""Training on several processes: all ranks start equal, and are checked to be."""

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["check_equal_ranks", "is_distributed", "mean_over_ranks", "synchronize", "widest_over_ranks"]


def is_distributed() -> bool:
    """Whether there is a process group of more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def synchronize(controller: Any) -> None:
    """Give every rank the parameters, the buffers and the controller state of rank 0.

    Buffers whose shape follows from data may have other shapes on other ranks: the shapes go first.

    Raises:
        RuntimeError: there is no process group; or the ranks have built different models.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("distributed() needs a process group: call torch.distributed.init_process_group")
    if dist.get_world_size() == 1:
        return
    model = controller.model
    names = [name for name, _ in _tensors_of(model)]
    _require_same("parameters and buffers", names)
    shared: list[Any] = [None]
    if dist.get_rank() == 0:
        plain = {name: value.detach().cpu() for name, value in model.state_dict().items()}
        shared = [(plain, controller.get_state())]
    dist.broadcast_object_list(shared, src=0)
    parameters, state = shared[0]
    if dist.get_rank() != 0:
        model.load_state_dict(parameters)
        controller.load_state(state)
    check_equal_ranks(controller)


def check_equal_ranks(controller: Any) -> None:
    """Compare parameters, buffers and controller state of all ranks, bit for bit.

    Raises:
        RuntimeError: they differ; the message names what.
    """
    if not is_distributed():
        return
    for name, tensor in _tensors_of(controller.model):
        _require_same(name, _digest(tensor))
    _require_same("controller state", repr(controller.get_state()))


def _tensors_of(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in model.state_dict().items() if isinstance(value, Tensor)]


def _digest(tensor: Tensor) -> str:
    # A copy: memory that numpy has seen cannot be resized any more, and empty buffers take their shape later.
    data = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
    return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(data.numpy().tobytes()).hexdigest()}"


def _require_same(what: str, value: Any) -> None:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    others = [rank for rank, its in enumerate(gathered) if its != gathered[0]]
    if others:
        raise RuntimeError(f"{what} of ranks {others} differ from those of rank 0")


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of ``value`` over all ranks."""
    if not is_distributed():
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def widest_over_ranks(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The least ``low`` and the greatest ``high`` of all ranks."""
    if not is_distributed():
        return low, high
    low, high = low.clone(), high.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    return low, high
