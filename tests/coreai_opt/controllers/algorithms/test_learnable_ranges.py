from typing import Any

import pytest
import torch

from coreai_opt.controllers import create_compressed_model

from ..support import check_compiles, check_no_waits, configured, make_model


def learnable(**more: Any) -> dict[str, Any]:
    return {"algorithm": "quantization", "learnable_ranges": True, **more}


@pytest.mark.parametrize("preset", ["performance", "mixed"])
def test_it_starts_where_the_simulators_are(preset: str) -> None:
    plain, fixed = create_compressed_model(
        make_model().eval(), configured({"algorithm": "quantization", "preset": preset})
    )
    controller, model = create_compressed_model(make_model().eval(), configured(learnable(preset=preset)))
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(model(x), fixed(x), rtol=1e-3, atol=1e-3)
    for name, simulator in controller.activations.items():
        scale, zero_point, _ = simulator.calculate_qparams()
        its_scale, its_zero_point, _ = plain.activations[name].calculate_qparams()
        torch.testing.assert_close(scale, its_scale)
        assert int(zero_point) == int(its_zero_point)


@pytest.mark.parametrize("preset", ["performance", "mixed"])
def test_zero_is_exact_and_ranges_learn(preset: str) -> None:
    controller, model = create_compressed_model(make_model(), configured(learnable(preset=preset)))
    before = {name: each.detach().clone() for name, each in model.named_parameters() if "range" in name}
    assert len(before) == 6
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(8, 1, 8, 8)).square().mean().backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    for simulator in controller.activations.values():
        assert float(simulator(torch.zeros(1)).detach()) == 0


def test_a_range_that_collapses_stays_finite() -> None:
    controller, model = create_compressed_model(make_model(), configured(learnable()))
    with torch.no_grad():
        for simulator in (*controller.activations.values(), *controller.weights.values()):
            simulator.range.zero_()
    assert bool(model(torch.randn(2, 1, 8, 8)).isfinite().all())


def test_strip_keeps_the_outputs() -> None:
    controller, model = create_compressed_model(make_model().eval(), configured(learnable()))
    x = torch.randn(2, 1, 8, 8)
    stripped = controller.strip()
    assert torch.equal(stripped(x), model(x))
    assert not any("parametrizations" in name for name in stripped.state_dict())


def test_it_needs_data() -> None:
    config = learnable(initializer={"range": {"num_init_samples": 0}})
    with pytest.raises(ValueError, match="num_init_samples must not be 0"):
        create_compressed_model(make_model(), configured(config))


def test_nothing_waits() -> None:
    check_no_waits(configured(learnable(preset="mixed")))


def test_compiles() -> None:
    check_compiles(configured(learnable(preset="mixed")))
