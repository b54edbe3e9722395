"""Compressed weights as dense ones, for torch: simulators go, and leave their result in the weight."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from coreai_opt._restoring import training_flags

__all__ = ["fold", "give_own_class"]

# A module and the name of one of its parametrized tensors.
_Slot = tuple[nn.Module, str]


def fold(model: nn.Module, kind: type[nn.Module]) -> list[_Slot]:
    """Give the tensors that have a simulator of ``kind`` their simulated values, without parametrizations.

    A tensor loses all its parametrizations, those of other kinds too. Values are those of evaluation mode.
    They are written into the tensor behind the parametrizations: it stays the same object, in the same
    memory where shape and dtype allow it, and slots that share it go on sharing it. Tensors are folded one
    after the other; if a simulator raises, those before it are folded, and the others as they were.

    Args:
        model: is changed in place. Copies of it, which torch lets share classes with it, are not.
        kind: class of the simulators.

    Returns:
        The modules and names of the tensors that were folded.
    """
    by_original: dict[int, list[_Slot]] = {}
    for module, name in _slots_of(model, kind):
        chain = _chain_of(module, name)
        by_original.setdefault(id(chain.original if chain.is_tensor else chain), []).append((module, name))
    for slots in by_original.values():
        if _chain_of(*slots[0]).is_tensor:
            _fold_shared(slots)
        else:
            _fold_assembled(*slots[0])
    return [slot for slots in by_original.values() for slot in slots]


def give_own_class(module: nn.Module) -> None:
    """Let ``module`` share its class with no other.

    torch makes a class for each parametrized module, which its copies share, and takes the attribute off that
    class when a parametrization goes: off all copies.
    """
    shared = type(module)
    members = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, members)


def _slots_of(model: nn.Module, kind: type[nn.Module]) -> Iterator[_Slot]:
    for module in model.modules():
        if parametrize.is_parametrized(module):
            chains: Any = module.parametrizations
            for name, chain in chains.items():
                if any(isinstance(each, kind) for each in chain):
                    yield module, name


def _chain_of(module: nn.Module, name: str) -> Any:
    return module.parametrizations[name]  # type: ignore[index]


@torch.no_grad()
def _fold_shared(slots: list[_Slot]) -> None:
    """Fold the slots of one tensor. They go on sharing it where their parametrizations are the same."""
    original: Tensor = _chain_of(*slots[0]).original
    values: dict[tuple[int, ...], Tensor] = {}
    for slot in slots:
        chain = _chain_of(*slot)
        if _members(chain) not in values:
            with training_flags(chain, False):
                value = original
                for parametrization in chain:
                    value = parametrization(value)
            values[_members(chain)] = value
    first, *others = values
    tensors = {members: _like(original, values[members]) for members in others}
    _write(original, values[first])
    tensors[first] = original
    for module, name in slots:
        chain = _chain_of(module, name)
        _put(chain, tensors[_members(chain)])
        give_own_class(module)
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)


def _fold_assembled(module: nn.Module, name: str) -> None:
    """Fold a tensor that its first parametrization makes of several ones: it becomes one of its own."""
    with training_flags(_chain_of(module, name), False):
        give_own_class(module)
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _members(chain: Any) -> tuple[int, ...]:
    return tuple(map(id, chain))


def _like(original: Tensor, value: Tensor) -> Tensor:
    """``value`` as a tensor of its own: a parameter if ``original`` is one."""
    value = value.detach().clone()
    return nn.Parameter(value, original.requires_grad) if isinstance(original, nn.Parameter) else value


def _write(tensor: Tensor, value: Tensor) -> None:
    if value is tensor:
        return
    if (value.shape, value.dtype, value.device) == (tensor.shape, tensor.dtype, tensor.device) and (
        0 not in tensor.stride()
    ):
        tensor.copy_(value)
    else:
        tensor.data = value.detach().clone()


def _put(chain: Any, tensor: Tensor) -> None:
    """Let ``tensor`` be what is behind the parametrizations."""
    if chain.original is tensor:
        return
    table = chain._parameters if "original" in chain._parameters else chain._buffers
    table["original"] = tensor
