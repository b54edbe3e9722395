"""What a simulator is, and what it does to a tensor."""

from typing import Any

import torch
from torch import Tensor

import coreai_kernels
from coreai_opt.config.spec import CompressionSimulatorBase
from coreai_opt.palettization.kmeans.kmeans_fake_palettize import _KMeansFakePalettize
from coreai_opt.palettization.spec.fake_palettize import _FakePalettizeImplBase
from coreai_opt.pruning.spec import PruneImplBase
from coreai_opt.quantization.spec import _numbers
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["describe", "ends_of"]

_PICTURE = 32
_GROUPS = ((1, 2), (1, 4), (2, 4), (1, 8), (2, 8), (4, 8))


def describe(simulator: CompressionSimulatorBase, tensor: Tensor | None) -> dict[str, Any]:
    """Kind and settings of a simulator, and what it does to ``tensor``, if there is one."""
    if isinstance(simulator, FakeQuantizeImplBase):
        return _quantization(simulator, tensor)
    if isinstance(simulator, PruneImplBase):
        return _pruning(simulator)
    if isinstance(simulator, _FakePalettizeImplBase):
        return _palettization(simulator, tensor)
    return {"kind": type(simulator).__name__}


def ends_of(simulator: FakeQuantizeImplBase) -> tuple[Tensor, Tensor] | None:
    """The smallest and the largest value that each block can have; None if parameters depend on the input."""
    scale = getattr(simulator.qparams_calculator, "scale", None)
    if simulator.is_stateless or not isinstance(scale, Tensor) or not scale.numel():
        return None
    scale, zero_point, minval = simulator.calculate_qparams()
    is_float = _numbers.is_float_format(simulator.dtype)
    ends = []
    for code in (simulator.quant_min, simulator.quant_max):
        if is_float:
            ends.append(code * scale.float())
        elif simulator.qformulation == "minval" and minval is not None:
            ends.append((code - simulator.quant_min) * scale.float() + minval.float())
        else:
            offset = 0 if zero_point is None else zero_point.float()
            ends.append((code - offset) * scale.float())
    return ends[0], ends[1]


def _quantization(simulator: FakeQuantizeImplBase, tensor: Tensor | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": "quantization",
        "dtype": str(simulator.dtype).removeprefix("torch."),
        "scheme": str(simulator.qscheme),
        "granularity": repr(simulator.granularity),
    }
    ends = ends_of(simulator)
    if ends is None:
        return found
    scale = simulator.calculate_qparams()[0].float()
    found |= {
        "blocks": scale.numel(),
        "smallest_scale": float(scale.min()),
        "largest_scale": float(scale.max()),
    }
    if tensor is None:
        return found
    low, high, step = (_spread(each, tensor) for each in (*ends, scale))
    if _numbers.is_float_format(simulator.dtype):
        step = torch.zeros_like(step)
    values = tensor.float()
    # Clipped is what lies off by more than half a step; saturated, what is an end afterwards. A symmetric
    # range ends half a step beyond the largest integer: rounding must not count its own end as clipped.
    beyond = step * (0.5 + 1e-4)
    found["clipped"] = _share((values < low - beyond) | (values > high + beyond))
    found["saturated"] = _share((values <= low + step / 2) | (values >= high - step / 2))
    return found


def _spread(per_block: Tensor, tensor: Tensor) -> Tensor:
    """One value a block, for each element."""
    # Parameters of a whole tensor may have been found on one of another rank.
    if per_block.numel() == 1:
        return per_block.reshape(()).expand(tensor.shape)
    for axis, (size, blocks) in enumerate(zip(tensor.shape, per_block.shape, strict=True)):
        if blocks not in (1, size):
            per_block = per_block.repeat_interleave(size // blocks, axis)
    return per_block.expand(tensor.shape)


def _share(where: Tensor) -> float:
    return float(where.float().mean()) if where.numel() else 0.0


def _pruning(simulator: PruneImplBase) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": "pruning", "scheme": repr(simulator.pruning_scheme)}
    mask = simulator.mask
    if not mask.numel():
        return found
    kept = mask != 0
    return found | {"sparsity": 1 - _share(kept), "pattern": _pattern(kept), "picture": _picture(kept)}


def _pattern(kept: Tensor) -> str:
    """The regular pattern that a mask has, as far as there is one."""
    if kept.all():
        return "dense"
    if kept.dim() >= 2:
        rows = kept.flatten(1)
        if bool((rows.all(1) | ~rows.any(1)).all()):
            return "whole output channels"
        columns = kept.transpose(0, 1).flatten(1)
        if bool((columns.all(1) | ~columns.any(1)).all()):
            return "whole input channels"
        for stays, of in _GROUPS:
            if rows.shape[1] % of == 0 and bool((rows.unflatten(1, (-1, of)).sum(-1) == stays).all()):
                return f"{stays} of {of}"
    return "unstructured"


def _picture(kept: Tensor) -> list[list[float]]:
    """The share of elements that stay in each of at most 32 x 32 parts of the mask."""
    plane = kept.float().flatten(1) if kept.dim() >= 2 else kept.float().reshape(1, -1)
    height, width = (min(size, _PICTURE) for size in plane.shape)
    parts = torch.nn.functional.adaptive_avg_pool2d(plane[None], (height, width))[0]
    return [[round(value, 3) for value in row] for row in parts.tolist()]


def _palettization(simulator: _FakePalettizeImplBase, weight: Tensor | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": "palettization",
        "n_bits": simulator.n_bits,
        "cluster_dim": simulator.cluster_dim,
        "granularity": repr(simulator.granularity),
    }
    used = None if weight is None else _uses(simulator, weight)
    if used is not None:
        entries = used.numel()
        dead = int((used == 0).sum())
        found |= {"palettes": len(used), "entries": entries, "dead_entries": dead, "dead": dead / entries}
    return found


def _uses(simulator: _FakePalettizeImplBase, weight: Tensor) -> Tensor | None:
    """How many indices point to each entry of a palette; None where they are not laid out as the weight."""
    indices, centroids = getattr(simulator, "indices", None), getattr(simulator, "centroids", None)
    if not isinstance(simulator, _KMeansFakePalettize) or indices is None or centroids is None:
        return None
    if indices.numel() * simulator.cluster_dim != weight.numel():
        return None
    mask = getattr(simulator, "_sparsity_mask", None)
    mass = torch.ones_like(weight, dtype=torch.float32) if mask is None else mask.float()
    palette = torch.zeros_like(centroids, dtype=torch.float32, requires_grad=True)
    with torch.enable_grad():
        block_size = simulator.blocks(weight).block_size
        looked_up = coreai_kernels.lookup(indices, palette, block_size=block_size)
    # The gradient of a look-up sums over the places that an entry is looked up for.
    (counts,) = torch.autograd.grad(looked_up, palette, mass)
    return counts[..., 0]
