"""Parametrized tensors of a model, and what a finalized one gets in their place."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["FinalizedWeight", "Slot", "hold", "is_finalized", "replace_simulator", "slots_of"]


class FinalizedWeight(nn.Module):
    """Base of the parametrizations that hold a compressed weight, and ignore their input."""


def is_finalized(module: nn.Module, attribute: str) -> bool:
    """Whether a tensor is held compressed, by a model that was finalized for a converter."""
    chain = getattr(module, "parametrizations", {})
    return attribute in chain and any(isinstance(each, FinalizedWeight) for each in chain[attribute])


@dataclass(frozen=True)
class Slot:
    """A tensor with a simulator on it.

    Attributes:
        module: the module that has the tensor.
        module_name: its qualified name, empty for the whole model.
        attribute: the tensor's name in it.
        chain: torch's list of the tensor's parametrizations.
        index: which of them the simulator is.
    """

    module: nn.Module
    module_name: str
    attribute: str
    chain: Any
    index: int

    @property
    def name(self) -> str:
        """The tensor's qualified name."""
        return f"{self.module_name}.{self.attribute}".lstrip(".")

    @property
    def simulator(self) -> Any:
        """The simulator."""
        return self.chain[self.index]

    @torch.no_grad()
    def value(self) -> Tensor:
        """What the simulator gets: the tensor behind, through the parametrizations that come before."""
        if self.chain.is_tensor:
            originals = [self.chain.original]
        else:
            originals = [getattr(self.chain, f"original{i}") for i in range(self.chain.ntensors)]
        value = originals[0] if self.chain.is_tensor else None
        for position in range(self.index):
            step = self.chain[position]
            value = step(*originals) if position == 0 else step(value)
        assert value is not None
        return value.detach()


def slots_of(model: nn.Module, kind: type[nn.Module]) -> Iterator[Slot]:
    """The first simulator of a kind on each tensor of the model."""
    for module_name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for attribute, chain in module.parametrizations.items():  # type: ignore[operator, union-attr]
                for index, each in enumerate(chain):
                    if isinstance(each, kind):
                        yield Slot(module, module_name, attribute, chain, index)
                        break


def replace_simulator(slot: Slot, constant: nn.Module) -> None:
    """Put a parametrization that does not depend on its input in the place of the simulator.

    Those before it go, as they have had their effect; those behind it stay. The tensor behind them has no
    elements then.
    """
    chain = slot.chain
    for _ in range(slot.index):
        del chain[0]
    chain[0] = constant.train(chain.training)
    if chain.is_tensor:
        chain.original = _emptied(chain.original)
        return
    first = chain.original0
    for i in range(chain.ntensors):
        delattr(chain, f"original{i}")
    del chain.ntensors
    chain.is_tensor = True
    _hold(chain, _emptied(first))


def hold(module: nn.Module, attribute: str, constant: nn.Module) -> None:
    """Let ``constant`` give a plain parameter or buffer of a module, which has no elements then."""
    # unsafe: torch would run the constant to see what it returns.
    parametrize.register_parametrization(module, attribute, constant.train(module.training), unsafe=True)
    chain: Any = module.parametrizations[attribute]  # type: ignore[index]
    chain.original = _emptied(chain.original)


def _emptied(tensor: Tensor) -> Tensor:
    empty = tensor.detach().new_empty(0)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _hold(chain: nn.Module, tensor: Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        chain.register_parameter("original", tensor)
    else:
        chain.register_buffer("original", tensor)
