"""Whether a model without channels computes what it does with masked ones: tried, before it is pruned."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from coreai_opt.controllers.core.copies import copy_model
from coreai_opt.controllers.core.hooks import remove_hooks
from coreai_opt.controllers.core.layers import channel_axis_of
from coreai_opt.controllers.structures.channels import Channels
from coreai_opt.controllers.structures.shrink import mask_of, shrink

__all__ = ["mask_axis", "masked_tensors", "removable"]


def masked_tensors(layer: nn.Module) -> list[str]:
    """The tensors of a producer or follower that are masked."""
    if isinstance(layer, nn.PReLU):  # slopes of a channel of zeros have no effect
        return []
    return [name for name in ("weight", "bias") if getattr(layer, name, None) is not None]


def mask_axis(layer: nn.Module, tensor: Tensor) -> int:
    """The axis of a tensor with one entry for each output channel, or for each input of a depthwise one."""
    depthwise_transposed = channel_axis_of(layer) == 1 and getattr(layer, "groups", 1) > 1
    return 0 if tensor.dim() == 1 or depthwise_transposed else channel_axis_of(layer)


def mask_entries(layer: nn.Module, tensor: Tensor, mask: Tensor) -> Tensor:
    """The mask of a layer's outputs, for one of its tensors."""
    size = tensor.shape[mask_axis(layer, tensor)]
    return mask if mask.numel() == size else mask[:: mask.numel() // size]


@torch.no_grad()
def removable(
    model: nn.Module, channels: Channels, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[int], dict[int, str]]:
    """The clusters that can be removed together, and why the others cannot.

    Half of the channels are masked, and removed, and the outputs of an example compared.

    Args:
        model: the uncompressed model; it stays as it is.
        channels: of the model.
        args: positional arguments of an example forward.
        kwargs: its keyword arguments.
    """
    everything = list(range(len(channels.clusters)))
    if not everything or _trial(model, channels, args, kwargs) is None:
        return everything, {}
    good: list[int] = []
    bad: dict[int, str] = {}
    # Those whose number is written down are the likely ones: without them, most models are done.
    free = [number for number in everything if not channels.clusters[number].written]
    if free and _trial(model, channels.only(free), args, kwargs) is None:
        good = free
    for number in everything:
        if number in good:
            continue
        reason = _trial(model, channels.only([*good, number]), args, kwargs)
        if reason is None:
            good = sorted([*good, number])
        else:
            bad[number] = reason
    return good, bad


def _trial(model: nn.Module, channels: Channels, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """What goes wrong if channels are removed; None if nothing does."""
    masked = copy_model(model).eval()
    remove_hooks(masked, lambda hook: True)
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    kept = []
    for cluster in channels.clusters:
        mask = torch.zeros(cluster.size)
        mask[torch.randperm(cluster.size, generator=generator)[: max(cluster.size // 2, 1)]] = 1
        kept.append(mask.to(device))
    done: set[int] = set()
    for name, spans in (*channels.producers.items(), *channels.followers.items()):
        layer = masked.get_submodule(name)
        for attribute in masked_tensors(layer):
            tensor = getattr(layer, attribute)
            if id(tensor) not in done:
                done.add(id(tensor))
                mask = mask_entries(layer, tensor, mask_of(spans, kept))
                axis = mask_axis(layer, tensor)
                tensor.mul_(mask.reshape([-1 if index == axis else 1 for index in range(tensor.dim())]))
    stripped = copy_model(masked)
    shrink(stripped, channels, kept)
    expected = _tensors(masked(*args, **kwargs))
    try:
        outputs = _tensors(stripped(*args, **kwargs))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        text = str(error).splitlines()
        return (
            f"the model does not run with fewer channels ({type(error).__name__}: {text[0] if text else ''})"
        )
    return None if _equal(outputs, expected) else "with fewer channels the model has other outputs"


def _tensors(output: Any) -> list[Tensor]:
    return [each for each in tree_leaves(output) if isinstance(each, Tensor)]


def _equal(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    if [each.shape for each in outputs] != [each.shape for each in expected]:
        return False
    for mine, its in zip(outputs, expected, strict=True):
        if its.is_floating_point() and its.numel():
            share = 1e-3 if its.dtype in (torch.float32, torch.float64) else 5e-2
            bound = share * max(float(its.float().abs().max()), 1e-6)
            if not float((mine.float() - its.float()).abs().max()) <= bound:
                return False
        elif not torch.equal(mine, its):
            return False
    return True
