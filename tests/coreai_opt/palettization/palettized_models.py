"""The model and the configurations of the palettizer's tests."""

import torch
from torch import nn
from torch.nn.utils import parametrize

from coreai_opt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from coreai_opt.palettization.config import PATSchedule

INPUTS = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
TARGET = torch.ones(6, 4)


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))


def make_config(schedule=None, **fields):
    spec = PalettizationSpec(**({"n_bits": 2} | fields))
    module_config = ModuleKMeansPalettizerConfig(
        op_state_spec={"weight": spec},
        enable_fast_kmeans_mode=False,
        pat_schedule=None if schedule is None else PATSchedule(enable_fake_palettize=schedule),
    )
    return KMeansPalettizerConfig(global_config=module_config)


def prepared(schedule=None, **fields):
    palettizer = KMeansPalettizer(make_model(), make_config(schedule, **fields))
    return palettizer, palettizer.prepare((INPUTS,))


def loss_of(output, target):
    return (output - target).square().mean()


def simulator_of(module, attribute="weight"):
    return module.parametrizations[attribute][0]


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, state):
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
