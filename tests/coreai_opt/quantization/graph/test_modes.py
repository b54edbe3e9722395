"""Training and evaluation of an exported graph."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .support import Function, prepared, x

STOCHASTIC = [
    nn.Dropout(0.7),
    nn.Dropout2d(0.7),
    nn.AlphaDropout(0.7),
    nn.FeatureAlphaDropout(0.7),
    nn.RReLU(),
    Function(lambda m, a: F.scaled_dot_product_attention(a, a, a, dropout_p=0.7 if m.training else 0.0)),
]


@pytest.mark.parametrize("layer", STOCHASTIC, ids=lambda layer: type(layer).__name__)
def test_what_draws_random_numbers_in_training_does_not_in_evaluation(layer: nn.Module) -> None:
    _, found = prepared(layer.train(), x(2, 3, 4, 4))
    inputs = torch.randn(2, 3, 4, 4)
    assert not torch.equal(found(inputs), found(inputs))
    assert found.eval() is found
    assert torch.equal(found(inputs), found(inputs))
    assert found.train() is found
    assert not torch.equal(found(inputs), found(inputs))


def test_dropouts_keep_their_probability() -> None:
    _, found = prepared(nn.Sequential(nn.Dropout(0.9)).train(), x(8, 8))
    kept = found(torch.ones(64, 64))
    assert torch.equal(kept[kept != 0], torch.full_like(kept[kept != 0], 1 / (1 - 0.9)))
    assert (kept == 0).float().mean() > 0.85


def batch_norm(**options: Any) -> nn.BatchNorm1d:
    found = nn.BatchNorm1d(4, **options)
    with torch.no_grad():
        found.running_var.fill_(0.01)  # type: ignore[union-attr, operator]
    return found


def test_batch_norms_keep_eps_and_momentum() -> None:
    layer = batch_norm(eps=0.1, momentum=0.5).eval()
    _, found = prepared(layer, x(2, 4))
    inputs = torch.randn(8, 4)
    assert torch.equal(found(inputs), layer(inputs))
    twin = batch_norm(eps=0.1, momentum=0.5)
    found.train()
    assert torch.equal(found(inputs), twin(inputs))
    assert torch.equal(found.get_buffer("running_mean"), twin.running_mean)


def test_strict_upstream_gives_them_apples_numbers() -> None:
    layer = nn.Sequential(batch_norm(eps=0.1, momentum=0.5), nn.Dropout(0.9)).eval()
    _, found = prepared(layer, x(2, 4), strict_upstream=True)
    inputs = torch.randn(8, 4)
    usual = batch_norm().eval()
    assert torch.equal(found(inputs), usual(inputs))
    found.train()
    torch.manual_seed(0)
    output = found(inputs)
    torch.manual_seed(0)
    assert torch.equal(output, F.dropout(usual.train()(inputs), 0.5))
    assert torch.equal(found.get_buffer("0.running_mean"), usual.running_mean)


def test_batch_norms_without_statistics_work_on_the_batch_in_both_modes() -> None:
    _, found = prepared(nn.BatchNorm1d(4, track_running_stats=False), x(8, 4))
    inputs = torch.randn(8, 4)
    assert torch.equal(found.train()(inputs), found.eval()(inputs))


def test_a_compiled_graph_follows_the_mode() -> None:
    _, found = prepared(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), x(2, 4))
    compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
    inputs = torch.randn(64, 4)
    for _ in range(2):
        found.eval()
        assert torch.equal(compiled(inputs), found(inputs))
        found.train()
        assert (compiled(inputs) == 0).float().mean() > 0.3
