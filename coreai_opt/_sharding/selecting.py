"""The largest magnitudes of sharded tensors, found without bringing the tensors together.

What :func:`coreai_kernels.topk_masks` keeps of whole tensors, bit for bit. Magnitudes are compared as
integers (their bits without the sign). The threshold is found digit by digit: each rank counts its elements
by the next digit, among those that have the digits found so far, and the counts are added up over the ranks.
Ties go to the lowest index in the whole tensor, found in the same way.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from coreai_kernels.reference.magnitude import magnitude_keys
from coreai_opt._sharding.layout import Part, part_of

__all__ = ["DIGIT_BITS", "topk_masks"]

# 2048 counters of 8 bytes: three rounds for float32, two for half precision.
DIGIT_BITS = 11
_BITS = {torch.float32: 31, torch.float64: 63, torch.bfloat16: 15, torch.float16: 15}

# Numbers of a part's elements, the largest of which are looked for; -1 for those that are out of it.
_Keys = Callable[[], Tensor]


class _Member:
    """A part of a tensor that is ranked in a group of tensors.

    Attributes:
        group: the number of the group.
        part: the elements.
        first: how many elements of other tensors come before this tensor's in its group.
        dtype: in which magnitudes are compared.
    """

    def __init__(self, group: int, part: Part, first: int, dtype: torch.dtype) -> None:
        self.group, self.part, self.first, self.dtype = group, part, first, dtype

    def magnitudes(self) -> Tensor:
        return magnitude_keys(self.part.local.to(self.dtype)).long()

    def positions(self) -> Tensor:
        """Where the elements are among all of the group, row by row through the whole tensors."""
        stride, index = 1, torch.tensor(self.first, device=self.part.local.device)
        for axis in reversed(range(self.part.local.ndim)):
            start, size = self.part.offset[axis], self.part.local.shape[axis]
            along = (torch.arange(size, device=index.device) + start) * stride
            shape = [-1] + [1] * (self.part.local.ndim - 1 - axis)
            index = index + along.reshape(shape)
            stride *= self.part.shape[axis]
        return index.expand(self.part.local.shape)


@torch.no_grad()
def topk_masks(groups: Sequence[tuple[Sequence[Tensor], int]]) -> list[list[Tensor]]:
    """Masks of this rank's parts of sharded tensors, in several groups at once.

    All ranks have to call it together, with the same groups. For all groups together there is one all-reduce
    of 16 KiB a group for each 11 bits of the magnitudes, three for float32, and one for each 11 bits of the
    number of elements, which settles ties. The host waits for none of them.

    Args:
        groups: DTensors that are ranked together, and how many of their elements stay.

    Returns:
        For each group, for each tensor the ones and zeros of the part that this rank holds.
    """
    members: list[list[_Member]] = []
    for number, (weights, _) in enumerate(groups):
        common = functools.reduce(torch.promote_types, (weight.dtype for weight in weights))
        counts = [0]
        for weight in weights:
            counts.append(counts[-1] + weight.numel())
        members.append(
            [
                _Member(number, part_of(weight), first, common)
                for weight, first in zip(weights, counts, strict=False)
            ]
        )
    flat = [member for group in members for member in group]
    if not flat:
        return [[] for _ in groups]
    device = flat[0].part.local.device
    kept = torch.tensor([keep for _, keep in groups], dtype=torch.int64, device=device)
    bits = max(_BITS[member.dtype] for member in flat)
    threshold, missing = _select(flat, [member.magnitudes for member in flat], kept, bits)
    masks = [(member.magnitudes() > threshold[member.group]) & (kept[member.group] > 0) for member in flat]

    # Of those at the threshold, the first ones: the largest of the positions counted from behind.
    largest = max(sum(weight.numel() for weight in weights) for weights, _ in groups)

    def ties_of(member: _Member) -> Tensor:
        tied = member.magnitudes() == threshold[member.group]
        return torch.where(tied, largest - 1 - member.positions(), -1)

    ties: list[_Keys] = [functools.partial(ties_of, member) for member in flat]
    last, _ = _select(flat, ties, missing, max(1, (largest - 1).bit_length()))
    for member, mask, tied in zip(flat, masks, ties, strict=True):
        mask |= (tied() >= last[member.group]) & (missing[member.group] > 0)
    found = iter(zip(flat, masks, strict=True))
    return [[_as_mask(*next(found)) for _ in group] for group in members]


def _as_mask(member: _Member, mask: Tensor) -> Tensor:
    return mask.to(member.part.local.dtype)


def _select(
    members: Sequence[_Member], keys: Sequence[_Keys], count: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """The key of each group that is the ``count``-th largest, and how many of those equal to it are counted.

    Where ``count`` is 0, so is the second result, and the first has no meaning.
    """
    digits = math.ceil(bits / DIGIT_BITS)
    bins = 1 << DIGIT_BITS
    found = torch.zeros_like(count)
    for shift in reversed(range(0, digits * DIGIT_BITS, DIGIT_BITS)):
        histograms: dict[tuple[Any, ...], Tensor] = {}
        for member, of_member in zip(members, keys, strict=True):
            groups = member.part.groups
            if groups not in histograms:
                histograms[groups] = count.new_zeros(len(count), bins)
            key = of_member().reshape(-1)
            begins_alike = (key >= 0) & (key >> min(shift + DIGIT_BITS, 63) == found[member.group])
            digit = (key >> shift) & (bins - 1)
            histograms[groups][member.group].scatter_add_(0, digit, begins_alike.long())
        for groups, histogram in histograms.items():
            for group in groups:
                dist.all_reduce(histogram, group=group)
        total = functools.reduce(torch.add, histograms.values())
        # How many have this digit or a larger one: the last digit for which that is enough.
        at_least = total.flip(1).cumsum(1).flip(1)
        digit = (at_least >= count[:, None]).sum(1).clamp_min(1) - 1
        above = torch.cat([at_least, at_least.new_zeros(len(count), 1)], 1)
        count = count - above.gather(1, digit[:, None] + 1)[:, 0]
        found = (found << DIGIT_BITS) | digit
    return found, count
