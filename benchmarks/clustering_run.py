"""One clustering as a user asks for it, with whichever `coreai_opt` the process imports."""

import time

import torch

__all__ = ["GROUP", "cluster"]

# Rows that share a palette, of the granularity "groups".
GROUP = 16


def cluster(size: int, dtype: str, granularity: str, n_bits: int, threads: int) -> dict[str, float]:
    """Palettize a linear layer of ``size``² normally distributed weights.

    Args:
        granularity: ``"tensor"`` or ``"groups"``; ``"half zeros"`` is a tensor a random half of which is
            pruned, and whose palette is for the other half (joint sparsity).

    Returns:
        Seconds of the palettizer's ``prepare``, and the sum of squared errors of the palettized weight.
    """
    # Imported late: in the worker, the package's folder comes onto the path first.
    from coreai_opt.palettization import (
        KMeansPalettizer,
        KMeansPalettizerConfig,
        ModuleKMeansPalettizerConfig,
        PalettizationSpec,
    )
    from coreai_opt.palettization.spec import PerGroupedChannelGranularity, PerTensorGranularity

    torch.set_num_threads(threads)
    blocks = PerGroupedChannelGranularity(axis=0, group_size=GROUP) if granularity == "groups" else None
    pruned = granularity == "half zeros"
    spec = PalettizationSpec(
        n_bits=n_bits,
        granularity=blocks or PerTensorGranularity(),
        sparsity_detection_threshold=0.1 if pruned else None,
    )
    weights = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    layer = torch.nn.Linear(size, size, bias=False, dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.normal_(0, 0.02, generator=generator)
        if pruned:
            layer.weight[torch.rand(size, size, generator=generator) < 0.5] = 0
    before = layer.weight.detach().clone()
    palettizer = KMeansPalettizer(layer, KMeansPalettizerConfig(global_config=weights))
    example = torch.zeros(1, size, dtype=layer.weight.dtype)
    start = time.perf_counter()
    palettizer.prepare((example,))
    seconds = time.perf_counter() - start
    with torch.no_grad():
        error = (layer.weight.double() - before.double()).square().sum().item()
    return {"seconds": seconds, "error": error}
