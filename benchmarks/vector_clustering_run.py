"""One clustering of vectors as a user asks for it, with whichever `coreai_opt` the process imports."""

import functools
import itertools
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

__all__ = ["KINDS", "cluster_vectors"]

KINDS = ("normal", "heavy", "trained")


def cluster_vectors(kind: str, size: int, dim: int, n_bits: int, seed: int, threads: int) -> dict[str, float]:
    """Palettize a linear layer of ``size``² weights with one palette of vectors.

    Args:
        kind: one of :data:`KINDS`: normally distributed; by Student's t with three degrees of freedom; or the
            hidden layer of a network that was trained on scikit-learn's digits.
        seed: of torch's generator while the palette is sought.

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

    torch.set_num_threads(threads)
    spec = PalettizationSpec(n_bits=n_bits, cluster_dim=dim)
    weights = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec}, enable_fast_kmeans_mode=False)
    layer = nn.Linear(size, size, bias=False)
    before = _weight(kind, size)
    with torch.no_grad():
        layer.weight.copy_(before)
    palettizer = KMeansPalettizer(layer, KMeansPalettizerConfig(global_config=weights))
    torch.manual_seed(seed)
    start = time.perf_counter()
    palettizer.prepare((torch.zeros(1, size),))
    seconds = time.perf_counter() - start
    with torch.no_grad():
        error = (layer.weight.double() - before.double()).square().sum().item()
    return {"seconds": seconds, "error": error}


@functools.cache
def _weight(kind: str, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    if kind == "trained":
        return _trained(size, generator)
    weight = 0.02 * torch.randn(size, size, generator=generator)
    if kind == "heavy":
        weight /= torch.randn(3, size, size, generator=generator).square().mean(0).sqrt()
    return weight


def _trained(size: int, generator: torch.Generator) -> Tensor:
    pixels, labels = load_digits(return_X_y=True)
    images, targets = torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels).long()
    widths = (64, size, size, 10)
    weights = [
        (torch.randn(below, above, generator=generator) / above**0.5).requires_grad_()
        for above, below in itertools.pairwise(widths)
    ]
    optimizer = torch.optim.Adam(weights, 1e-3)
    for _ in range(150):
        batch = torch.randint(len(images), (128,), generator=generator)
        x = images[batch]
        for weight in weights[:-1]:
            x = torch.relu(x @ weight.T)
        loss = nn.functional.cross_entropy(x @ weights[-1].T, targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weights[1].detach()
