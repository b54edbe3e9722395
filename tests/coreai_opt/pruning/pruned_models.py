"""A small model, configurations for it, and what the tests of the pruner look at."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from coreai_opt import ExportBackend
from coreai_opt.pruning import MagnitudePrunerConfig, ModuleMagnitudePrunerConfig, PruningSpec
from coreai_opt.pruning.config import PolynomialDecaySchedule

TORCH = ExportBackend.Torch
RAMP = PolynomialDecaySchedule(total_iters=9, update_frequency=2)


def entry(sparsity=0.5, names=("weight",), schedule=None, **fields):
    spec = {name: PruningSpec(target_sparsity=sparsity) for name in names}
    return ModuleMagnitudePrunerConfig(op_state_spec=spec, sparsity_schedule=schedule, **fields)


def everywhere(spec, schedule=None, **fields):
    module = ModuleMagnitudePrunerConfig(
        op_state_spec={"weight": spec, "in_proj_weight": spec}, sparsity_schedule=schedule
    )
    return MagnitudePrunerConfig(global_config=module, **fields)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(32, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.relu(self.fc(self.drop(self.norm(self.conv(x))).flatten(1))))


def simulators(model):
    return {
        f"{name}.{attribute}": chain[0]
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for attribute, chain in module.parametrizations.items()
    }


def sparsities(model):
    return {name: each.sparsity for name, each in simulators(model).items()}


def zeros(weight):
    return int((weight == 0).sum())


def train(model, pruner, x, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        loss = (model(x) - torch.randn(6, 4, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
        losses.append(loss.item())
    return losses
