"""Which module a quantizer belongs to."""

from typing import Any

import pytest
import torch
from torch import nn

from coreai_opt.quantization import ModuleQuantizerConfig, QuantizerConfig
from coreai_opt.quantization._graph.owners import owners_of, schedules_of
from coreai_opt.quantization.config import QATSchedule

from .support import Function, mlp, prepared, simulators, x


def owners(model: Any) -> dict[str, list[str]]:
    found = owners_of(model)
    return {name: found[each] for name, each in simulators(model).items()}


def test_a_shared_edge_belongs_to_whose_configuration_holds() -> None:
    _, found = prepared(mlp(), x(2, 4))
    assert owners(found)["activation_post_process_2"] == ["1"]
    config = QuantizerConfig(module_name_configs={"2": ModuleQuantizerConfig()})
    _, found = prepared(mlp(), x(2, 4), config=config)
    assert owners(found)["activation_post_process_2"] == ["2"]


def test_functions_belong_to_the_module_that_calls_them() -> None:
    model = nn.Sequential(Function(lambda m, t: torch.relu(t + 1.0)), nn.Linear(4, 2))
    _, found = prepared(model, x(2, 4))
    assert owners(found)["activation_post_process_0"] == ["0"]


def test_modules_with_different_schedules_that_share_a_quantizer() -> None:
    pool = Function(lambda m, t: torch.max_pool1d(t, 1))
    model = nn.Sequential(nn.Linear(4, 4), pool, nn.Linear(4, 2))
    _, found = prepared(model, x(2, 3, 4))
    shared = simulators(found)["activation_post_process_2"]
    assert owners_of(found)[shared] == ["0", "1"]
    first, second = QATSchedule(enable_fake_quant=1), QATSchedule(enable_fake_quant=2)
    assert schedules_of(found, {"0": first, "1": first})[shared] == first
    with pytest.warns(UserWarning, match="share a quantizer"):
        assert schedules_of(found, {"0": first, "1": second})[shared] == first


def test_a_part_of_another_model_has_no_quantizers_here() -> None:
    quantizer, _ = prepared(mlp(), x(2, 4))
    with pytest.raises(ValueError, match="part of the prepared model"):
        quantizer.enable_observer(nn.Linear(4, 4))
