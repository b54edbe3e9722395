"""Situations in which compression used to damage a model without a word."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.optim.swa_utils import AveragedModel

from coreai_opt.controllers import create_compressed_model, register_default_init_args

from ..support import Run, configured, make_model

MASKS = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}
MOVEMENT = {
    "algorithm": "movement_sparsity",
    "params": {
        "warmup_start_epoch": 0,
        "warmup_end_epoch": 1,
        "importance_regularization_factor": 0.1,
        "steps_per_epoch": 2,
        "enable_structured_masking": False,
    },
}
INT8 = {"algorithm": "quantization"}
ALGORITHMS = {
    "magnitude": MASKS,
    "rb": {"algorithm": "rb_sparsity"},
    "const": {"algorithm": "const_sparsity"},
    "movement": MOVEMENT,
    "int8": INT8,
    "int4": {"algorithm": "quantization", "weights": {"bits": 4}},
    "learned": {"algorithm": "quantization", "learnable_ranges": True},
    "palettes": {"algorithm": "palettization", "bits": 3},
}


class Tied(nn.Module):
    """An embedding whose weight is the head's, and two linear layers that share theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.other = nn.Linear(16, 16)
        self.head = nn.Linear(16, 24, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.relu(self.first(self.embed(tokens)))
        return self.head(self.other(F.relu(self.second(x))))


def tokens() -> Tensor:
    return torch.randint(24, (4, 6), generator=torch.Generator().manual_seed(0))


def tied(*algorithms: dict[str, Any]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = {"input_info": {"sample_size": [4, 6], "type": "long"}, "compression": list(algorithms)}
    config = register_default_init_args(config, [(tokens(), tokens())])
    return create_compressed_model(Tied(), config)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_shared_weight_is_compressed_once_and_everywhere(name: str) -> None:
    controller, model = tied(ALGORITHMS[name])
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        controller.scheduler.epoch_step()
        for _ in range(2):
            controller.scheduler.step()
            optimizer.zero_grad()
            (
                F.cross_entropy(model(tokens()).flatten(0, 1), tokens().flatten()) + controller.loss()
            ).backward()
            optimizer.step()
    model.eval()
    expected = model(tokens())
    stripped = controller.strip()
    assert torch.equal(stripped(tokens()), expected)
    assert stripped.head.weight is stripped.embed.weight
    assert stripped.second.weight is stripped.first.weight
    assert torch.equal(model.head.weight, model.embed.weight)
    found = next(iter(controller.statistics().to_dict().values()))
    layers = [each["name"] for each in found.get("layers", found.get("tensors", []))]
    weights = [each for each in layers if not each.endswith("input")]
    if "layers" in found:
        assert sorted(weights) == ["first", "head", "other"]


def test_a_weight_that_an_ignored_module_shares_stays_whole(caplog: pytest.LogCaptureFixture) -> None:
    controller, model = tied({**MASKS, "ignored_scopes": ["embed"]})
    assert bool((model.head.weight != 0).all())
    assert bool((model.first.weight == 0).any())
    left = controller.statistics().magnitude_sparsity.left_whole
    assert [each.name for each in left] == ["head"]
    assert "'embed', which is ignored" in left[0].reason
    assert "leaves head whole" in caplog.text
    assert "left whole" in controller.statistics().to_str()


def test_shared_and_quantized_weights_are_exported(tmp_path: Path) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    import onnxruntime

    for algorithms in ([MASKS], [INT8]):
        controller, model = tied(*algorithms)
        model.eval()
        controller.export_model(tmp_path / "model.onnx")
        options = onnxruntime.SessionOptions()
        # Fused, products of 8-bit integers saturate on CPUs without VNNI.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        session = onnxruntime.InferenceSession(
            tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        feed = {session.get_inputs()[0].name: tokens().numpy()}
        output = torch.from_numpy(session.run(None, feed)[0])
        torch.testing.assert_close(output, model(tokens()).detach(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("more", [{}, {"group_size": 8}, {"per_channel_scale": True}])
def test_masked_zeros_stay_zero_under_palettes(bits: int, more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    palettes = {"algorithm": "palettization", "bits": bits, **more}
    controller, model = create_compressed_model(model, {"compression": [MASKS, palettes]})
    weight = model[0].weight.detach()
    assert float((weight == 0).float().mean()) == 0.5
    original = model[0].parametrizations.weight.original.detach()
    kept = weight != 0
    if not more:
        assert weight[kept].unique().numel() == 2**bits
        # The palette is that of the kept values: each entry the mean of its own.
        for value in weight[kept].unique():
            torch.testing.assert_close(original[weight == value].mean(), value, rtol=1e-3, atol=1e-3)
    # Training moves what is masked, too; the palettes follow what is kept.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        controller.scheduler.step()
        optimizer.zero_grad()
        model(torch.ones(2, 64)).square().sum().backward()
        optimizer.step()
    assert float((model[0].weight == 0).float().mean()) >= 0.5
    stripped = controller.strip()
    assert torch.equal(stripped[0].weight, model.eval()[0].weight)


def test_a_layer_that_is_masked_whole_has_palettes_of_nothing() -> None:
    everything = {"algorithm": "magnitude_sparsity", "sparsity_init": 1.0}
    palettes = {"algorithm": "palettization", "bits": 2}
    _, model = create_compressed_model(
        nn.Sequential(nn.Linear(8, 8)), {"compression": [everything, palettes]}
    )
    assert not bool(model[0].weight.any())


def test_filters_and_palettes_strip_to_the_same_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 4)
    )
    filters = {"algorithm": "filter_pruning", "pruning_init": 0.5, "params": {"prune_first_conv": True}}
    config = {
        "input_info": {"sample_size": [1, 3, 8, 8]},
        "compression": [filters, {"algorithm": "palettization", "bits": 2}],
    }
    controller, model = create_compressed_model(model, config)
    x = torch.randn(2, 3, 8, 8)
    stripped = controller.strip()
    assert stripped[0].out_channels == 16
    torch.testing.assert_close(stripped(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_channel_of_zeros_keeps_its_zeros_under_channel_scales() -> None:
    model = nn.Sequential(nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight[1].zero_()
    palettes = {"algorithm": "palettization", "bits": 2, "per_channel_scale": True}
    controller, model = create_compressed_model(model, {"compression": palettes})
    assert not bool(model[0].weight[1].any())
    assert not bool(controller.strip()[0].weight[1].any())


class Attentive(nn.Module):
    """Attention, a layer that never runs, one that runs in training alone, one that a function uses."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
        self.unused, self.auxiliary, self.used = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        x = self.cross(x, x[..., :6], x[..., :6])[0]
        if self.training:
            x = x + self.auxiliary(x)
        return F.linear(x, self.used.weight, self.used.bias)


def attentive(samples: int, **more: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = {
        "input_info": {"sample_size": [2, 5, 8]},
        "compression": {**INT8, "initializer": {"range": {"num_init_samples": samples}}, **more},
    }
    data = [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))]
    return create_compressed_model(Attentive(), register_default_init_args(config, data))


@pytest.mark.parametrize("samples", [0, 4])
def test_layers_whose_forward_does_not_run(samples: int, tmp_path: Path) -> None:
    controller, model = attentive(samples)
    assert set(controller.weights) == {
        "encoder.self_attn.in_proj_weight",
        "encoder.self_attn.out_proj",
        "encoder.linear1",
        "encoder.linear2",
        "cross.q_proj_weight",
        "cross.k_proj_weight",
        "cross.v_proj_weight",
        "cross.out_proj",
        "used",
    }
    assert set(controller.activations) == {"encoder.self_attn", "encoder.linear1", "encoder.linear2", "cross"}
    left = {each.name for each in controller.statistics().quantization.left_whole}
    assert {"unused", "auxiliary", "input of used", "input of cross.out_proj"} <= left
    weight = model.encoder.self_attn.in_proj_weight
    assert all(row.unique().numel() <= 256 for row in weight)
    float_model = Attentive()
    float_model.load_state_dict(
        {
            name.replace("parametrizations.", "").replace(".original", ""): value
            for name, value in model.state_dict().items()
            if "quantizer" not in name and ".0." not in name
        }
    )
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    model.train()
    model(x)
    model.eval()
    with torch.no_grad():
        error = (model(x) - float_model.eval()(x)).abs().max()
    assert 0 < float(error) < 0.1
    stripped = controller.strip()
    assert not any("parametrizations" in name for name in stripped.state_dict())
    torch.testing.assert_close(stripped(x), model(x), rtol=1e-4, atol=1e-4)
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    import onnxruntime

    controller.export_model(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    output = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(output, model(x).detach(), rtol=0.05, atol=0.05)


def test_nothing_that_runs_is_an_error() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x

    config = register_default_init_args({"compression": INT8}, [torch.ones(1, 4)])
    with pytest.raises(ValueError, match="reads none of the weights"):
        create_compressed_model(Idle(), config)


def _old_weight_norm(layer: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        weight_norm(layer)


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "old_weight_norm": _old_weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", COMPUTED)
def test_weights_that_something_else_computes_are_refused(kind: str, algorithm: str) -> None:
    model = make_model()
    COMPUTED[kind](model.head)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="weight of 'head' is computed by"):
        create_compressed_model(model, configured(ALGORITHMS[algorithm]))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    if algorithm != "movement":  # whose layers are linear: there is no other
        controller, _ = create_compressed_model(
            model, configured({**ALGORITHMS[algorithm], "ignored_scopes": ["head"]})
        )
        assert "head" not in controller.statistics().to_str().split()


def test_an_error_in_the_middle_leaves_the_model_as_it_was() -> None:
    model = make_model()
    names, modules = list(model.state_dict()), [type(each) for each in model.modules()]
    running = model.norm.running_mean.clone()

    def broken() -> Iterator[Tensor]:
        yield torch.randn(2, 1, 8, 8)
        raise OSError("the disk is gone")

    config = register_default_init_args(
        {"compression": [MASKS, {**INT8, "initializer": {"range": {"num_init_samples": 2}}}]}, broken()
    )
    with pytest.raises(OSError, match="the disk is gone"):
        create_compressed_model(model, config)
    assert list(model.state_dict()) == names
    assert [type(each) for each in model.modules()] == modules
    assert torch.equal(model.norm.running_mean, running)
    assert not any(each._forward_pre_hooks for each in model.modules())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("trained", [False, True])
def test_a_moving_average_outlives_the_strip_of_its_model(algorithm: str, trained: bool) -> None:
    run = Run(configured(ALGORITHMS[algorithm]))
    if trained:
        run.train(3)
    average = AveragedModel(run.model)
    average.update_parameters(run.model)
    run.train(4)
    average.update_parameters(run.model)
    x = torch.randn(2, 1, 8, 8)
    average.eval()
    expected = average(x)
    run.controller.strip(do_copy=False)
    assert torch.equal(average(x), expected)
    assert torch.equal(copy.deepcopy(average)(x), expected)


def test_a_loader_that_can_be_read_once_serves_every_initialisation() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.BatchNorm1d(1), nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.norm(x))

    batch = torch.tensor([[0.0], [6.0], [3.0], [3.0]]) * (9 / 6) ** 0.5
    batch = (batch - batch.mean()) / batch.std() * 3 + 3
    _, model = create_compressed_model(
        Normed(), register_default_init_args({"compression": INT8}, iter([batch]))
    )
    torch.testing.assert_close(model.norm.running_mean, torch.tensor([3.0]))
    torch.testing.assert_close(model.norm.running_var, torch.tensor([9.0]))
    with pytest.raises(ValueError, match="gives no batch"):
        create_compressed_model(Normed(), register_default_init_args({"compression": INT8}, iter([])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("algorithm", ["magnitude", "rb", "const", "movement", "int8", "learned", "palettes"])
def test_other_dtypes_before_and_after(algorithm: str, dtype: torch.dtype) -> None:
    config = {"input_info": {"sample_size": [2, 1, 8, 8]}, "compression": ALGORITHMS[algorithm]}
    for late in (False, True):
        model = make_model() if late else make_model().to(dtype)
        data = [torch.randn(4, 1, 8, 8, dtype=torch.float32 if late else dtype) for _ in range(2)]
        controller, model = create_compressed_model(model, register_default_init_args(config, data))
        model = model.to(dtype).train()
        controller.scheduler.epoch_step()
        controller.scheduler.step()
        loss = model(torch.randn(2, 1, 8, 8, dtype=dtype)).float().square().mean() + controller.loss()
        loss.backward()
        assert bool(loss.isfinite())
        assert model.head.weight.dtype == dtype


def test_the_teacher_follows_the_student() -> None:
    distilled = {"algorithm": "knowledge_distillation", "type": "softmax"}
    controller, model = create_compressed_model(make_model(), configured(distilled))
    model.bfloat16().train()
    model(torch.randn(2, 1, 8, 8, dtype=torch.bfloat16))
    assert bool(controller.loss().isfinite())
    assert next(controller.teacher.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("algorithm", ["rb", "movement", "learned"])
def test_the_learning_rate_multiplier_survives_a_copy(algorithm: str) -> None:
    gradients = []
    for factor, copied in ((1.0, False), (0.25, False), (0.25, True)):
        config = configured({**ALGORITHMS[algorithm], "compression_lr_multiplier": factor})
        controller, model = create_compressed_model(make_model(), config)
        controller.scheduler.epoch_step(0)
        controller.scheduler.step(0)
        model = copy.deepcopy(model) if copied else model
        model.train()(torch.ones(2, 1, 8, 8)).square().mean().backward()
        own = {n: p.grad for n, p in model.named_parameters() if n.endswith(("logits", "scores", "range"))}
        gradients.append(own)
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], 0.25 * whole)
        torch.testing.assert_close(gradients[2][name], 0.25 * whole)
    assert gradients[0]


def test_what_has_no_effect_is_refused() -> None:
    distilled = {"algorithm": "knowledge_distillation", "type": "mse", "temperature": 2.0}
    with pytest.raises(ValueError, match="temperature and class_axis are for type 'softmax'"):
        create_compressed_model(make_model(), configured(distilled))
    with pytest.raises(ValueError, match="target_device"):
        configured(MASKS, target_device="TPU")
