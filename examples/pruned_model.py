"""How ``digits_qat.py`` prunes a model: masks on its weights, a schedule, and zeros in the end."""

import copy
from dataclasses import dataclass, field

import torch
from quantized_model import Size
from torch import Tensor, nn

import coreai_kernels
from coreai_opt import ExportBackend
from coreai_opt.pruning import (
    MagnitudePruner,
    MagnitudePrunerConfig,
    ModuleMagnitudePrunerConfig,
    PruningSpec,
)
from coreai_opt.pruning.config import PolynomialDecaySchedule
from coreai_opt.pruning.spec import NMStructured

PATTERNS = {
    # The three quarters of each weight that are nearest to zero.
    "sparse75": PruningSpec(target_sparsity=0.75),
    # Two of every four consecutive input channels stay: a pattern that GPUs compute with at twice the speed.
    "sparse24": PruningSpec(pruning_scheme=NMStructured(n=2, m=4, axis=1)),
}


def pruning_config(spec: PruningSpec, steps: int) -> MagnitudePrunerConfig:
    """Prune all weights but the first layer's, which has few. Half of the ``steps`` lead to the target."""
    schedule = PolynomialDecaySchedule(total_iters=max(2, steps // 2))
    weights = ModuleMagnitudePrunerConfig(op_state_spec={"weight": spec}, sparsity_schedule=schedule)
    return MagnitudePrunerConfig(global_config=weights).without("stem")


@dataclass
class Pruning:
    """A copy of a model that is being pruned, and its sparsity after each step."""

    model: nn.Module
    pruner: MagnitudePruner
    sparsities: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, spec: PruningSpec, example: Tensor, steps: int) -> "Pruning":
        model = copy.deepcopy(model)
        pruner = MagnitudePruner(model, pruning_config(spec, steps))
        pruner.prepare((example,))
        return cls(model, pruner)

    def step(self) -> None:
        self.pruner.step()
        masks = [buffer for name, buffer in self.model.named_buffers() if name.endswith("mask")]
        self.sparsities.append(1 - sum(float(m.sum()) for m in masks) / sum(m.numel() for m in masks))

    def finished(self) -> nn.Module:
        """A copy of the model with plain weights."""
        return self.pruner.finalize(copy.deepcopy(self.model), backend=ExportBackend.Torch)


@torch.no_grad()
def sparse_size(model: nn.Module) -> Size:
    """Store the pruned weights as a file would hold them, values and a bit for each element; count the bytes.

    Raises:
        RuntimeError: what was stored does not stand for exactly the weights.
    """
    values = masks = rest = 0
    for parameter in model.parameters():
        kept = parameter != 0
        if parameter.ndim < 2 or kept.float().mean() > 0.6:
            rest += parameter.nbytes
            continue
        stored, mask = parameter[kept], coreai_kernels.pack_bits(kept.to(torch.uint8), 1)
        restored = torch.zeros_like(parameter)
        bits = coreai_kernels.unpack_bits(mask, 1, parameter.numel()).reshape(parameter.shape)
        restored[bits.bool()] = stored
        if not torch.equal(restored, parameter):
            raise RuntimeError(f"stored weights {tuple(parameter.shape)} differ from the model's")
        values += stored.nbytes
        masks += mask.nbytes
    return Size(values, masks, rest)


def zeros(model: nn.Module) -> float:
    """The fraction of the layers' weights that are zero."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
