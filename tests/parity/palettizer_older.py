"""Palettized models that 0.3.0 knows, too: what a checkpoint of it holds.

Runs on whichever package ``import coreai_opt`` finds, through its public names.
"""

from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)

from .snapshots import freeze

__all__ = ["CASES", "answer", "new", "weights_of"]

GROUPS = {"type": "per_grouped_channel", "axis": 0, "group_size": 4}
CASES: dict[str, dict[str, Any]] = {
    "scalars": {},
    "groups": {"granularity": GROUPS},
    "scaled": {"enable_per_channel_scale": True},
    "LUT in int8": {"lut_qspec": {"dtype": "int8"}, "granularity": GROUPS},
    "LUT in float8": {"lut_qspec": {"dtype": "float8_e4m3fn"}},
    "vectors": {"cluster_dim": 2},
}
INPUTS = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))


def new(name: str, seed: int) -> tuple[KMeansPalettizer, nn.Module]:
    """A model with weights of its own, and its palettizer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    spec = PalettizationSpec(n_bits=2, **CASES[name])
    config = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec}, enable_fast_kmeans_mode=False)
    return KMeansPalettizer(model, KMeansPalettizerConfig(global_config=config)), model


def weights_of(model: nn.Module) -> list[Tensor]:
    """Its palettized weights."""
    return [model[0].weight, model[2].weight]


def answer(job: dict[str, Any]) -> Any:
    """The state, the weights and the output of each case."""
    found = {}
    for name in CASES:
        palettizer, model = new(name, 0)
        palettizer.prepare((INPUTS,))
        found[name] = freeze(
            {"state": model.state_dict(), "weights": tuple(weights_of(model)), "output": model(INPUTS)}
        )
    return found
