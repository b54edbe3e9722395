from typing import Any

import pytest
import torch
from torch import nn

from coreai_opt.controllers import CompressionStage, create_compressed_model, register_default_init_args
from coreai_opt.controllers.algorithms.quantization_config import RangeInitializer
from coreai_opt.controllers.algorithms.ranges import ActivationRange, weight_range

from ..support import Run, check_compiles, check_no_waits, configured, loader, make_model

RANGES = ["mixed_min_max", "min_max", "mean_min_max", "threesigma", "percentile", "mean_percentile"]


def quantization(**more: Any) -> dict[str, Any]:
    return {"algorithm": "quantization", **more}


def ranged(kind: str, **more: Any) -> dict[str, Any]:
    return quantization(initializer={"range": {"type": kind}}, **more)


def samples() -> torch.Tensor:
    return torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) + 1


@pytest.mark.parametrize(
    ("kind", "symmetric"), [*((kind, False) for kind in RANGES), ("mixed_min_max", True)]
)
def test_an_activation_range_is_its_definition(kind: str, symmetric: bool) -> None:
    x = samples()
    found = ActivationRange(
        RangeInitializer(type=kind, params={"min_percentile": 10, "max_percentile": 90}), symmetric
    )
    found.observe(x[:4])
    found.observe(x[4:])
    low, high = found.result()
    ordered = x.sort(dim=1).values
    everything = x.flatten().sort().values
    mad = (everything - everything.median()).abs().median() * 3 * 1.4826
    expected = {
        "min_max": (x.min(), x.max()),
        "mean_min_max": (x.amin(1).mean(), x.amax(1).mean()),
        "threesigma": (everything.median() - mad, everything.median() + mad),
        "percentile": (everything[24], everything[215]),
        "mean_percentile": (ordered[:, 4].mean(), ordered[:, 35].mean()),
    }
    expected["mixed_min_max"] = expected["min_max" if symmetric else "mean_min_max"]
    torch.testing.assert_close(torch.stack([low, high]), torch.stack(expected[kind]))


def test_a_weight_range_is_by_channel() -> None:
    weight = torch.arange(24.0).reshape(2, 3, 4)
    initializer = RangeInitializer(type="percentile", params={"min_percentile": 0, "max_percentile": 100})
    low, high = weight_range(weight, 1, initializer)
    assert low.tolist() == [0, 4, 8]
    assert high.tolist() == [15, 19, 23]
    low, high = weight_range(weight, None, initializer)
    assert (low.tolist(), high.tolist()) == ([0], [23])


def test_presets() -> None:
    performance, _ = create_compressed_model(make_model(), configured(quantization()))
    assert {str(each.qscheme) for each in performance.weights.values()} == {"symmetric"}
    # Symmetric: signed where the data are, else from zero on.
    assert [str(each.dtype) for each in performance.activations.values()] == [
        "torch.int8",
        "torch.uint8",
        "torch.uint8",
    ]
    mixed, _ = create_compressed_model(make_model(), configured(quantization(preset="mixed")))
    assert {str(each.qscheme) for each in mixed.activations.values()} == {"asymmetric"}
    assert {str(each.qscheme) for each in mixed.weights.values()} == {"symmetric"}


@pytest.mark.parametrize("kind", RANGES)
def test_the_simulators_get_the_ranges(kind: str) -> None:
    controller, model = create_compressed_model(make_model(), configured(ranged(kind, preset="mixed")))
    inputs = torch.cat([x for x, _ in loader()])
    found = ActivationRange(RangeInitializer(type=kind), symmetric=False)
    found.observe(inputs)
    low, high = found.result()
    scale = controller.activations["stem"].calculate_qparams()[0]
    torch.testing.assert_close(scale.reshape(()), (high - low) / 255)
    before = scale.clone()
    model(inputs * 100)
    assert torch.equal(controller.activations["stem"].calculate_qparams()[0], before)


def test_without_samples_ranges_follow_the_data() -> None:
    config = quantization(initializer={"range": {"num_init_samples": 0}})
    controller, model = create_compressed_model(make_model(), {"compression": config})
    model(torch.ones(1, 1, 8, 8))
    first = controller.activations["stem"].calculate_qparams()[0].clone()
    model(torch.ones(1, 1, 8, 8) * 50)
    assert float(controller.activations["stem"].calculate_qparams()[0]) > float(first)


def test_data_are_asked_for_before_anything_changes() -> None:
    model = make_model()
    names = list(model.state_dict())
    config = {"compression": [{"algorithm": "magnitude_sparsity"}, quantization()]}
    with pytest.raises(ValueError, match="register_default_init_args"):
        create_compressed_model(model, config)
    assert list(model.state_dict()) == names


def test_bits_and_rate() -> None:
    config = quantization(weights={"bits": 4, "per_channel": False}, activations={"bits": 4})
    controller, model = create_compressed_model(make_model(), configured(config))
    assert controller.compression_rate == 1 - 4 / 32
    weight = model.head.weight
    assert weight.unique().numel() <= 16
    assert controller.statistics().quantization.tensors[0].bits == 4


def test_the_models_input_can_stay_as_it_is() -> None:
    controller, _ = create_compressed_model(make_model(), configured(quantization(quantize_inputs=False)))
    assert sorted(controller.activations) == ["head", "inner"]
    assert sorted(controller.weights) == ["head", "inner", "stem"]


def test_transposed_convolutions_have_their_channels_in_axis_one() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 5, 2))
    config = register_default_init_args({"compression": ranged("percentile")}, [torch.randn(2, 3, 4, 4)])
    controller, _ = create_compressed_model(model, config)
    assert controller.weights["0"].calculate_qparams()[0].shape == (1, 5, 1, 1)


def test_staged_start() -> None:
    config = configured(
        quantization(params={"activations_quant_start_epoch": 2, "weights_quant_start_epoch": 1})
    )
    run = Run(config)
    stages = [run.controller.compression_stage()]
    for epoch in range(3):
        run.train(3 * epoch + 1)
        stages.append(run.controller.compression_stage())
    none, some, full = CompressionStage
    assert stages == [none, none, some, full]
    assert run.controller.compression_rate == 0.75


def test_ranges_are_initialised_when_their_stage_begins() -> None:
    config = configured(quantization(params={"activations_quant_start_epoch": 1}))
    controller, model = create_compressed_model(make_model(), config)
    before = controller.activations["inner"].calculate_qparams()[0].clone()
    with torch.no_grad():
        model.norm.weight.mul_(3)
    controller.scheduler.epoch_step()
    assert torch.equal(controller.activations["inner"].calculate_qparams()[0], before)
    controller.scheduler.epoch_step()
    assert float(controller.activations["inner"].calculate_qparams()[0]) > 1.5 * float(before)


def test_batch_norm_is_adapted_to_the_compressed_model() -> None:
    _, model = create_compressed_model(make_model(), configured(quantization()))
    seen = []
    model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.eval()
    for x, _ in loader():
        model(x)
    means = torch.stack([each.mean((0, 2, 3)) for each in seen]).mean(0)
    variances = torch.stack([each.var((0, 2, 3)) for each in seen]).mean(0)
    torch.testing.assert_close(model.norm.running_mean, means)
    torch.testing.assert_close(model.norm.running_var, variances)
    assert model.norm.momentum == 0.1


def test_strip_keeps_the_outputs() -> None:
    controller, model = create_compressed_model(make_model().eval(), configured(quantization()))
    stripped = controller.strip()
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(stripped(x), model(x))
    assert not any("parametrizations" in name for name in stripped.state_dict())
    assert torch.equal(model(x), stripped(x))


def test_pruned_elements_stay_zero() -> None:
    sparse = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}
    controller, model = create_compressed_model(make_model(), configured(quantization(), sparse))
    weights = torch.cat([layer.weight.flatten() for layer in (model.stem, model.inner, model.head)])
    assert float((weights == 0).float().mean()) >= 0.49
    assert [child.name for child in controller.child_ctrls] == ["magnitude_sparsity", "quantization"]


def test_nothing_waits() -> None:
    check_no_waits(configured(quantization()))


def test_compiles() -> None:
    check_compiles(configured(quantization()))


def test_activations_may_have_ranges_of_channels() -> None:
    per_channel = quantization(activations={"per_channel": True}, preset="mixed")
    controller, model = create_compressed_model(make_model().eval(), configured(per_channel))
    inputs = torch.cat([x for x, _ in loader()])
    seen = []
    model.inner.register_forward_pre_hook(lambda _, args: seen.append(args[0]), prepend=True)
    scale, _, _ = controller.activations["inner"].calculate_qparams()
    assert scale.shape == (1, 8, 1, 1)
    assert controller.activations["head"].calculate_qparams()[0].shape == (1, 128)
    with torch.no_grad():
        model(inputs)
    assert seen[0].shape[1] == 8
    broken = quantization(activations={"per_channel": True}, initializer={"range": {"type": "percentile"}})
    with pytest.raises(ValueError, match="are for whole activations"):
        create_compressed_model(make_model(), configured(broken))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_any_width(bits: int) -> None:
    config = quantization(weights={"bits": bits, "per_channel": False}, activations={"bits": bits})
    controller, model = create_compressed_model(make_model().eval(), configured(config))
    weight = model.head.weight.detach()
    scale = float(controller.weights["head"].calculate_qparams()[0])
    levels = weight / scale
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    assert float(levels.min().round()) >= -(2 ** (bits - 1))
    assert float(levels.max().round()) <= 2 ** (bits - 1) - 1
    assert float(levels.abs().max().round()) >= 2 ** (bits - 1) - 1
    assert controller.compression_rate == 1 - bits / 32
    activation = controller.activations["head"](torch.linspace(-10, 10, 100_000))
    assert activation.unique().numel() == 2**bits


def test_half_of_the_integers_against_overflow() -> None:
    for fix, expected in (
        ("enable", [64, 64, 64]),
        ("first_layer_only", [64, 128, 128]),
        ("disable", [128] * 3),
    ):
        controller, model = create_compressed_model(make_model(), configured(quantization(overflow_fix=fix)))
        found = []
        for name in ("stem", "inner", "head"):
            scale = controller.weights[name].calculate_qparams()[0]
            levels = (model.get_submodule(name).weight / scale).detach().abs().max()
            found.append(int(levels.round()))
        assert [abs(level - most) <= 1 for level, most in zip(found, expected, strict=True)] == [True] * 3
        assert controller.weights["stem"].n_bits == 8


def test_outputs_can_be_quantized() -> None:
    controller, model = create_compressed_model(
        make_model().eval(), configured(quantization(quantize_outputs=True))
    )
    assert "output_quantizers.0" in controller.activations
    scale = controller.activations["output_quantizers.0"].calculate_qparams()[0]
    levels = model(torch.randn(2, 1, 8, 8)) / scale
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    assert "output_quantizers.0" in [each.name for each in controller.statistics().quantization.tensors]
    stripped = controller.strip()
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(stripped(x), model(x))


def test_groups_scopes_and_overrides() -> None:
    config = quantization(
        weights={"ignored_scopes": ["stem"]},
        activations={"target_scopes": ["Net/Conv2d[inner]", "{re}Linear"], "ignored_scopes": ["inner"]},
        scope_overrides={"weights": {"{re}NNCFLinear": {"bits": 4, "mode": "asymmetric"}}},
        initializer={
            "range": [
                {"type": "min_max", "target_scopes": ["{re}Conv2d"], "num_init_samples": 8},
                {"type": "mean_min_max", "target_quantizer_group": "activations"},
            ],
            "precision": {"type": "manual", "bitwidth_per_scope": [[5, "inner"], [6, "head|INPUT0"]]},
        },
    )
    controller, _ = create_compressed_model(make_model(), configured(config))
    assert {name: each.n_bits for name, each in controller.weights.items()} == {"inner": 5, "head": 4}
    assert {name: each.n_bits for name, each in controller.activations.items()} == {"head": 6}
    assert str(controller.weights["head"].qscheme) == "asymmetric"


def test_a_logarithmic_range_starts_at_the_same_place() -> None:
    outputs = []
    for logarithmic in (False, True):
        config = quantization(learnable_ranges=True, weights={"logarithm_scale": logarithmic})
        controller, model = create_compressed_model(make_model().eval(), configured(config))
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
        outputs.append(model(x))
        outputs[-1].sum().backward()
        assert float(controller.weights["head"].range.grad.abs().sum()) > 0
    torch.testing.assert_close(*outputs, rtol=1e-2, atol=1e-2)
