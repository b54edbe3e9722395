"""Scales of NVFP4 as checkpoints have them: an e4m3 number for each block, divided by one number.

Simulators keep the products. A checkpoint has the reciprocal of the tensor's scale, by which readers divide:
``scale = block / global``, in float32.
"""

import torch
from torch import Tensor

__all__ = ["joined", "split"]

_E4M3 = torch.float8_e4m3fn
# Numbers are rounded when the simulator multiplies, when the largest one is divided by, and when compared.
_ROUNDINGS = 4
_NEIGHBOURS = 4


def joined(blocks: Tensor, of_tensor: Tensor) -> Tensor:
    """The scale of each block, float32, as the package compressed-tensors computes it."""
    return blocks.float() / of_tensor.float()


def split(scale: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The two levels of scales that a simulator holds.

    Args:
        scale: of each block, float32; or of a model that was cast since, which has rounded them.
        name: the weight's qualified name, for messages.

    Returns:
        float8_e4m3fn of the same shape, and float32 of shape (1,). :func:`joined` gives ``scale`` back, but
        for the last bit of some: where there is a number that gives all bits, it is the one.

    Raises:
        ValueError: there are no such numbers.
    """
    rounding = _ROUNDINGS * torch.finfo(scale.dtype).eps
    scale = scale.float()
    largest = scale.max().double()
    for code in range(0x7E, 0, -1):  # all positive e4m3 numbers from 448 on, which a simulator's largest has
        of_largest = torch.tensor(code, dtype=torch.uint8).view(_E4M3).double()
        step = largest / of_largest
        blocks = (scale / step.float()).to(_E4M3)
        if bool(((blocks.float() * step.float() - scale).abs_() <= rounding * scale).all()):
            return blocks, _reciprocal(step, blocks, scale)
    raise ValueError(
        f"the scales of {name!r} are not e4m3 numbers times one number: let its simulator observe the weight "
        f"again"
    )


def _reciprocal(step: Tensor, blocks: Tensor, scale: Tensor) -> Tensor:
    """The float32 number near ``1 / step`` that gives most of the scales exactly."""
    bits = (1 / step).float().reshape(1).view(torch.int32)
    found = [(bits + each).view(torch.float32) for each in range(-_NEIGHBOURS, _NEIGHBOURS + 1)]
    wrong = [int((joined(blocks, each) != scale).sum()) for each in found]
    return found[min(range(len(found)), key=lambda each: (wrong[each], abs(each - _NEIGHBOURS)))]
