"""Small compressed models whose checkpoints an earlier coreai-opt wrote.

    PYTHONPATH=FOLDER_OF_0.3.0 python -P checkpoints.py data/checkpoints-0.3.0.pt

writes for each compressor the state, and the outputs in evaluation mode.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["COMPRESSORS", "FILE", "INPUTS", "prepared"]

FILE = Path(__file__).parent / "data" / "checkpoints-0.3.0.pt"
INPUTS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
COMPRESSORS = ("pruner", "quantizer", "palettizer")


def prepared(name: str, seed: int) -> tuple[nn.Module, Any]:
    """A model prepared by the compressor of that name, and the compressor."""
    from coreai_opt.palettization import KMeansPalettizer
    from coreai_opt.pruning import MagnitudePruner, MagnitudePrunerConfig, ModuleMagnitudePrunerConfig
    from coreai_opt.pruning.config import PolynomialDecaySchedule
    from coreai_opt.quantization import Quantizer, QuantizerConfig

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    if name == "pruner":
        ramp = PolynomialDecaySchedule(total_iters=5, begin_step=1)
        config = MagnitudePrunerConfig(global_config=ModuleMagnitudePrunerConfig(sparsity_schedule=ramp))
        compressor: Any = MagnitudePruner(model, config)
    elif name == "quantizer":
        compressor = Quantizer(model, QuantizerConfig(execution_mode="eager"))
    else:
        compressor = KMeansPalettizer(model)
    compressor.prepare((INPUTS,))
    return model, compressor


def _write(file: str) -> None:
    found = {}
    for name in COMPRESSORS:
        model, compressor = prepared(name, seed=0)
        if name == "pruner":
            for _ in range(3):
                compressor.step()
        with torch.no_grad():
            outputs = model.eval()(INPUTS)
        found[name] = {"state": dict(model.state_dict()), "outputs": outputs}
    torch.save(found, file)


if __name__ == "__main__":
    _write(sys.argv[1])
