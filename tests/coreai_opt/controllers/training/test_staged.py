"""The optimizer of staged quantization."""

import pytest
import torch
from torch import nn

from coreai_opt.controllers import StagedWorker
from coreai_opt.controllers.algorithms.quantization_config import StagedParams


def worker(**params: float) -> StagedWorker:
    torch.manual_seed(0)
    return StagedWorker(nn.Linear(2, 1).parameters(), StagedParams(**params), steps_per_epoch=4)


def test_the_learning_rate_decays_and_weight_decay_ends() -> None:
    staged = worker(base_lr=0.1, base_wd=0.01, lr_poly_drop_start_epoch=1, lr_poly_drop_duration_epochs=2,
                    disable_wd_start_epoch=2)  # fmt: skip
    seen = []
    for _ in range(4):
        staged.epoch_step()
        group = staged.optimizer.param_groups[0]
        seen.append((group["lr"], group["weight_decay"]))
    expected = [(0.1, 0.01), (0.1, 0.01), (0.1 * 0.5**0.9, 0.0), (0.0, 0.0)]
    assert seen == [pytest.approx(each) for each in expected]


def test_gradients_of_several_batches_are_averaged() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    weights = []
    for multiplier, parts in ((1, 1), (2, 2)):
        torch.manual_seed(0)
        layer = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        staged = StagedWorker(layer.parameters(), StagedParams(batch_multiplier=multiplier), 4, optimizer)
        staged.epoch_step()
        stepped = []
        for part in x.chunk(parts):
            layer(part).square().mean().backward()
            stepped.append(staged.step())
        assert stepped == [False] * (parts - 1) + [True]
        assert all(each.grad is None for each in layer.parameters())
        weights.append(layer.weight.detach())
    torch.testing.assert_close(*weights)


def test_it_resumes() -> None:
    first = worker(base_lr=0.1, lr_poly_drop_start_epoch=0, lr_poly_drop_duration_epochs=3)
    first.epoch_step()
    first.epoch_step()
    first.step()
    second = worker(base_lr=0.1, lr_poly_drop_start_epoch=0, lr_poly_drop_duration_epochs=3)
    second.load_state_dict(first.state_dict())
    for each in (first, second):
        each.step()
    assert first.optimizer.param_groups[0]["lr"] == second.optimizer.param_groups[0]["lr"] < 0.1
    with pytest.raises(ValueError, match="steps_per_epoch must be positive"):
        StagedWorker([nn.Parameter(torch.ones(1))], StagedParams(), 0)
