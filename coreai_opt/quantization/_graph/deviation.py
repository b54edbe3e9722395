"""The square root of a batch norm's running variance, which that batch norm updates in place afterwards."""

import torch
from torch import Tensor

__all__ = ["deviation"]

# More than the ratio of sizes, 4, from which compilers keep what a reduction gives.
_COPIES = 8


def deviation(variance: Tensor) -> Tensor:
    """``variance.sqrt()``, of before the update in the backward, too.

    In compiled training the backward computes again what is cheap, from what the forward was given. Here that
    is a buffer which has other values by then; gradients would be off by what one batch changes in it. What a
    reduction gives is kept instead: in compiled code, the square root is the least of equal ones.
    """
    root = torch.sqrt(variance)
    if torch.compiler.is_compiling():
        return root.expand(_COPIES, *root.shape).amin(0)
    return root
