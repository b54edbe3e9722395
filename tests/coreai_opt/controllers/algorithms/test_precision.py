"""HAWQ: traces against the Hessian itself, bits against all assignments."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreai_opt.controllers import create_compressed_model, register_default_init_args
from coreai_opt.controllers.algorithms.precision import (
    assign_bits,
    hessian_traces,
    multiplications,
    output_errors,
)

from ..support import loader, make_model


def test_the_estimate_is_the_hessians_trace() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(32, 4), torch.randint(3, (32,))

    def loss_of(first: Tensor, second: Tensor) -> Tensor:
        hidden = torch.tanh(F.linear(x, first, model[0].bias))
        return F.cross_entropy(F.linear(hidden, second, model[2].bias), y)

    weights = {"0": model[0].weight, "2": model[2].weight}
    exact = torch.autograd.functional.hessian(loss_of, tuple(each.detach() for each in weights.values()))
    found = hessian_traces(model, weights, lambda: [F.cross_entropy(model(x), y)], 2000, 1e-12)
    for index, (name, weight) in enumerate(weights.items()):
        size = weight.numel()
        trace = exact[index][index].reshape(size, size).diagonal().sum() / size
        assert found[name] == pytest.approx(float(trace), rel=0.1)
    assert all(each.grad is None for each in model.parameters())


def test_bits_are_few_enough_and_cost_little() -> None:
    generator = torch.Generator().manual_seed(0)
    names = [f"layer{index}" for index in range(5)]
    costs = {name: int(torch.randint(10, 100, (), generator=generator)) for name in names}
    sensitivities = {}
    for name in names:
        scale = float(torch.rand((), generator=generator)) + 0.1
        sensitivities[name] = {bits: scale * 4.0 ** (8 - bits) for bits in (2, 4, 8)}
    for ratio in (1.0, 1.5, 3.0, 6.0):
        bits = assign_bits(sensitivities, costs, ratio)
        full = 64 * sum(costs.values())

        def operations(chosen: dict[str, int]) -> int:
            return sum(costs[name] * each**2 for name, each in chosen.items())

        def lost(chosen: dict[str, int]) -> float:
            return sum(sensitivities[name][each] for name, each in chosen.items())

        assert full >= ratio * operations(bits)
        every = (dict(zip(names, each, strict=True)) for each in itertools.product((2, 4, 8), repeat=5))
        best = min(lost(each) for each in every if full >= ratio * operations(each))
        assert lost(bits) == pytest.approx(best)
    assert set(assign_bits(sensitivities, costs, 1.0).values()) == {8}
    with pytest.raises(ValueError, match="bits reach 16"):
        assign_bits(sensitivities, costs, 17)


def hawq(**more: Any) -> dict[str, Any]:
    precision = {"type": "hawq", "bits": [2, 4, 8], "iter_number": 4, "num_data_points": 16, **more}
    return {
        "algorithm": "quantization",
        "initializer": {"precision": precision, "range": {"num_init_samples": 16}},
    }


def test_in_quantization() -> None:
    config = register_default_init_args(
        {"compression": hawq(compression_ratio=3.0)}, loader(), criterion=nn.CrossEntropyLoss()
    )
    model = make_model()
    costs = multiplications(
        model, {n: model.get_submodule(n) for n in ("stem", "inner", "head")}, (torch.ones(1, 1, 8, 8),), {}
    )
    assert costs == {"stem": 64 * 8 * 9, "inner": 64 * 64 * 9, "head": 1280}
    controller, model = create_compressed_model(model, config)
    bits = {name: each.n_bits for name, each in controller.weights.items()}
    assert 64 * sum(costs.values()) >= 3.0 * sum(costs[name] * each**2 for name, each in bits.items())
    assert {name: each.n_bits for name, each in controller.activations.items()} == bits
    assert len(set(bits.values())) > 1
    state = controller.get_compression_state()
    resumed, _ = create_compressed_model(make_model(), config, state)
    assert {name: each.n_bits for name, each in resumed.weights.items()} == bits


def test_a_search_by_outputs_needs_outputs_alone() -> None:
    config = register_default_init_args({"compression": hawq(type="autoq", compression_ratio=5.0)}, loader())
    model = make_model()
    weights = {name: model.get_submodule(name).weight for name in ("stem", "inner", "head")}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    data = [((x,), {}) for x, _ in loader()]
    halves = output_errors(model, weights, lambda name, bits: before[name] * (1 - 2.0**-bits), [1, 3], data)
    for name, weight in weights.items():
        assert torch.equal(weight, before[name])
        with torch.no_grad():
            model.eval()
            whole = [model(x) for x, _ in loader()]
            weight.copy_(before[name] * 0.5)
            errors = [
                float((model(x) - y).square().mean()) for (x, _), y in zip(loader(), whole, strict=True)
            ]
            weight.copy_(before[name])
        assert halves[name][1] == pytest.approx(sum(errors), rel=1e-5)
        assert halves[name][3] < halves[name][1]
    controller, model = create_compressed_model(model, config)
    bits = {name: each.n_bits for name, each in controller.weights.items()}
    assert set(bits.values()) <= {2, 4, 8}
    assert len(set(bits.values())) > 1
    for name, weight in before.items():
        own = model.get_submodule(name).parametrizations.weight.original
        assert torch.equal(own, weight)


def test_it_needs_a_criterion() -> None:
    with pytest.raises(ValueError, match="criterion"):
        create_compressed_model(make_model(), register_default_init_args({"compression": hawq()}, loader()))
