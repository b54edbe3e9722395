"""Sensitivities: measured, kept in files, and used."""

import pytest
import torch
from palettized_models import (
    INPUTS,
    TARGET,
    assert_unchanged,
    loss_of,
    make_config,
    make_model,
    prepared,
    simulator_of,
    state_of,
)

from coreai_opt.palettization import KMeansPalettizer

KEY = "0.parametrizations.weight.original"


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({KEY: torch.ones(12, 16)}, ValueError, r"must have its shape, \(16, 12\); got \(12, 16\)"),
        ({KEY: -torch.ones(16, 12)}, ValueError, "negative"),
        ({KEY: torch.full((16, 12), torch.nan)}, ValueError, "finite"),
        ({KEY: [1.0]}, TypeError, "tensor"),
        ([torch.ones(16, 12)], TypeError, "dict"),
    ],
)
def test_bad_sensitivities(tmp_path, content, error, message):
    path = tmp_path / "sensitivities.pt"
    torch.save(content, path)
    model = make_model()
    state = state_of(model)
    with pytest.raises(error, match=message):
        KMeansPalettizer(model, make_config()).prepare((INPUTS,), path)
    assert_unchanged(model, state)


def test_calibration_weighs_by_squared_gradients(tmp_path):
    palettizer, model = prepared()
    model.eval()
    plain = make_model().eval()
    squares = 0
    before = simulator_of(model[0]).centroids.clone()
    with palettizer.calibration_mode(loss_fn=loss_of, sensitivity_path=tmp_path / "measured.pt") as helper:
        for scale in (1, 2):
            assert torch.equal(model[0].weight, plain[0].weight)
            helper.step(model(scale * INPUTS), TARGET)
            plain.zero_grad()
            loss_of(plain(scale * INPUTS), TARGET).backward()
            squares = squares + plain[0].weight.grad.square()
    found = simulator_of(model[0]).sensitivities
    assert torch.allclose(found, squares / squares.max(), atol=1e-6)
    assert not torch.equal(simulator_of(model[0]).centroids, before)
    assert all(parameter.grad is None for parameter in model.parameters())
    measured = torch.load(tmp_path / "measured.pt")
    assert measured.keys() == {name for name, _ in model.named_parameters()}

    palettizer.save_sensitivities(tmp_path / "saved.pt")
    again = KMeansPalettizer(make_model(), make_config())
    again.prepare((INPUTS,), tmp_path / "saved.pt")
    assert torch.equal(simulator_of(again._model[0]).centroids, simulator_of(model[0]).centroids)


def test_gradients_during_calibration_are_the_sums():
    palettizer, model = prepared()
    before = torch.ones(16)
    model[0].bias.grad = before
    plain = make_model()
    sums = dict.fromkeys(("0.weight", "2.weight", "0.bias", "2.bias"), 0)
    with palettizer.calibration_mode(loss_fn=loss_of) as helper:
        for scale in (1, 2):
            helper.step(model(scale * INPUTS), TARGET)
            plain.zero_grad()
            loss_of(plain(scale * INPUTS), TARGET).backward()
            sums = {name: sums[name] + plain.get_parameter(name).grad.square() for name in sums}
            for name, parameter in model.named_parameters():
                expected = sums[name.replace("parametrizations.", "").replace(".original", "")]
                assert torch.allclose(parameter.grad, expected)
        # What a script does to them does not change the result.
        model.zero_grad(set_to_none=False)
        model[0].bias.grad.fill_(7)
    assert model[0].bias.grad is before
    assert [name for name, each in model.named_parameters() if each.grad is not None] == ["0.bias"]
    sensitivities = simulator_of(model[0]).sensitivities
    assert torch.allclose(sensitivities, sums["0.weight"] / sums["0.weight"].max(), atol=1e-6)


def test_zero_sensitivities_are_raised():
    palettizer, model = prepared()
    with palettizer.calibration_mode(loss_fn=lambda output, target: (output * target).sum()) as helper:
        helper.step(model(INPUTS), torch.zeros(6, 4))
    assert torch.equal(simulator_of(model[0]).sensitivities, torch.ones(16, 12))
    with palettizer.calibration_mode(loss_fn=loss_of) as helper:
        helper.step(model(INPUTS), TARGET)
    assert simulator_of(model[0]).sensitivities.min() > 0


def test_calibration_that_fails_changes_nothing(tmp_path):
    palettizer, model = prepared()
    output = model(INPUTS)
    state = state_of(model)

    def calibrate(*inputs, loss_fn=loss_of):
        with palettizer.calibration_mode(loss_fn=loss_fn, sensitivity_path=tmp_path / "none.pt") as helper:
            for each in inputs:
                helper.step(model(each), TARGET)

    def refuse(output, target):
        raise KeyError("mine")

    with pytest.raises(RuntimeError, match=r"step\(output, target\) at least once"):
        calibrate()
    with pytest.raises(KeyError, match="mine"):
        calibrate(INPUTS, loss_fn=refuse)
    with pytest.raises(ValueError, match="finite"):
        calibrate(INPUTS, INPUTS * torch.nan)
    assert not (tmp_path / "none.pt").exists()
    assert simulator_of(model[0]).sensitivities is None
    for name in ("0.parametrizations.weight.0.centroids", "0.parametrizations.weight.0.indices"):
        assert torch.equal(model.state_dict()[name], state[name])
    assert output.isfinite().all()
    with pytest.raises(ValueError, match="no sensitivities"):
        palettizer.save_sensitivities(tmp_path / "none.pt")


def test_weights_without_gradient_have_no_sensitivities(caplog):
    model = make_model()
    model[0].weight.requires_grad_(False)
    palettizer = KMeansPalettizer(model, make_config())
    palettizer.prepare((INPUTS,))
    with palettizer.calibration_mode(loss_fn=loss_of) as helper:
        helper.step(model(INPUTS), TARGET)
    assert simulator_of(model[0]).sensitivities is None
    assert simulator_of(model[2]).sensitivities is not None
    assert f"No sensitivities found for {KEY}" in caplog.text
