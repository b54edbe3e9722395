"""Parameters that FSDP2 has sharded: seen whole where an algorithm looks at them outside of a forward.

In a forward they are whole anyway. All ranks have to ask for one together, as they do for a step, an epoch or
a loss.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

if dist.is_available():
    from torch.distributed.tensor import DTensor

__all__ = ["refuse", "whole"]


def _is_sharded(tensor: Tensor) -> bool:
    return dist.is_available() and isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one whose shards lie on several ranks; gradients go to the shards."""
    sharded: Any = tensor
    return sharded.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[no-any-return]


def refuse(model: nn.Module, what: str) -> None:
    """RuntimeError if parameters of the model are sharded, for ``what`` changes its modules."""
    if any(_is_sharded(parameter) for parameter in model.parameters()):
        raise RuntimeError(
            f"{what} needs whole parameters, and those of this model are sharded: create the compressed "
            f"model anew from the compression state, load the full state dict into it, and use that"
        )
