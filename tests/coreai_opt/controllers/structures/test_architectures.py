"""Filter pruning on many architectures: what is stripped computes what is masked, and costs what is said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from coreai_opt.controllers import create_compressed_model, register_default_init_args

from .architectures import ARCHITECTURES, IMAGE, Functional, UnsharedHeads, grouped, make, transposed

EVERYTHING = {"prune_first_conv": True, "prune_downsample_convs": True}


def pruned(model: nn.Module, shape: tuple[int, ...], **more: Any) -> tuple[Any, Any]:
    params = {**EVERYTHING, **more.pop("params", {})}
    filters = {"algorithm": "filter_pruning", "pruning_init": 0.5, "params": params, **more}
    info = {"sample_size": list(shape), "filler": "random"}
    return create_compressed_model(model, {"input_info": info, "compression": filters})


def counted(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(shape))
    return counter.get_total_flops(), sum(each.numel() for each in model.parameters())


def assert_same(a: Any, b: Any) -> None:
    for mine, its in zip(tree_leaves(a), tree_leaves(b), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_masked_is_stripped(name: str) -> None:
    _, shape, prunable = ARCHITECTURES[name]
    model = make(name)
    full = counted(model, shape)
    if not prunable:
        with pytest.raises(ValueError, match="finds no filters to prune"):
            pruned(model, shape)
        assert counted(model, shape) == full
        return
    controller, model = pruned(model, shape)
    found = controller.statistics().filter_pruning
    assert (found.full_flops, found.full_parameters) == full
    model.eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    stripped = controller.strip()
    assert_same(stripped(x), model(x))
    assert (found.flops, found.parameters) == counted(stripped, shape)
    assert found.parameters < found.full_parameters
    # A training step moves nothing that is masked.
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        sum(each.square().mean() for each in tree_leaves(model(x))).backward()
        optimizer.step()
    model.eval()
    assert_same(controller.strip()(x), model(x))


PRUNED = {
    "resnet": 12,
    "mobilenet_v2": 8,
    "mobilenet_v3": 9,
    "efficientnet": 10,
    "densenet": 8,
    "unet": 7,
    "fpn": 5,
    "shared head": 3,
    "recurrent": 2,
    "tied": 3,
    "functional": 2,
    "transposed": 2,
    "1-D": 3,
    "3-D": 2,
    "siamese": 2,
    "normalized": 4,
}


@pytest.mark.parametrize("name", PRUNED)
def test_what_can_be_pruned_is(name: str) -> None:
    controller, _ = pruned(make(name), ARCHITECTURES[name][1])
    layers = controller.statistics().filter_pruning.layers
    assert len(layers) == PRUNED[name], [each.name for each in layers]
    assert all(each.pruned > 0 for each in layers if each.filters > 8)


def test_what_cannot_is_named() -> None:
    controller, _ = pruned(grouped(), IMAGE)
    left = {each.name: each.reason for each in controller.statistics().filter_pruning.left_whole}
    assert "in groups" in left["0"]
    assert left["8"] == "they are outputs of the model"
    controller, _ = pruned(make("shufflenet"), IMAGE)
    left = {each.name: each.reason for each in controller.statistics().filter_pruning.left_whole}
    assert "chunk" in left["0.0"]


def test_an_ignored_depthwise_convolution_keeps_its_channels() -> None:
    for scopes in ({"ignored_scopes": ["5"]}, {"target_scopes": ["0", "2"]}):
        controller, _ = pruned(transposed().eval(), IMAGE, **scopes)
        assert [each.name for each in controller.statistics().filter_pruning.layers] == ["0"]
        left = {each.name: each.reason for each in controller.statistics().filter_pruning.left_whole}
        assert "'5', which is not in scope" in left["2"]


def test_functions_on_ignored_layers_do_not_matter() -> None:
    controller, model = pruned(Functional().eval(), IMAGE, ignored_scopes=["b"])
    assert [each.name for each in controller.statistics().filter_pruning.layers] == ["a"]
    x = torch.randn(IMAGE)
    torch.testing.assert_close(controller.strip()(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_shared_head_loses_the_same_channels_of_both_inputs() -> None:
    controller, _ = pruned(UnsharedHeads().eval(), IMAGE)
    clusters = {each.name: each.cluster for each in controller.statistics().filter_pruning.layers}
    assert clusters["left"] == clusters["right"] != clusters["head"]


def test_bfloat16() -> None:
    model = make("resnet").bfloat16()
    controller, model = pruned(model, (2, 3, 32, 32))
    x = torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)
    assert controller.statistics().filter_pruning.share_of_filters > 0.3
    assert controller.strip()(x).shape == model(x).shape


def test_one_that_is_written_down_stays() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16 * 144, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(x).relu()).relu().view(x.shape[0], 16 * 144))

    controller, _ = pruned(Written().eval(), IMAGE)
    assert [each.name for each in controller.statistics().filter_pruning.layers] == ["a"]
    left = {each.name: each.reason for each in controller.statistics().filter_pruning.left_whole}
    assert "does not run with fewer channels" in left["b"]


def test_a_size_that_is_asked_for_does_not_keep_channels_whole() -> None:
    class Asked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            n, c, h, w = x.shape
            return self.b(x.view(n, c, h * w).relu().view(n, c, h, w))

    controller, model = pruned(Asked().eval(), IMAGE)
    assert [each.name for each in controller.statistics().filter_pruning.layers] == ["a"]
    x = torch.randn(IMAGE)
    torch.testing.assert_close(controller.strip()(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "llama", "qwen", "gpt2", "vit", "distilbert"])
def test_movement_on_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    torch.manual_seed(0)
    tokens = {"sample_size": [2, 6], "type": "long"}
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(vocab_size=40, **small))
    elif kind == "llama":
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=40, num_key_value_heads=2, **small)
        )
    elif kind == "qwen":
        model = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(vocab_size=40, num_key_value_heads=2, **small)
        )
    elif kind == "gpt2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=4, n_positions=16)
        )
    elif kind == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=4, **small))
        tokens = {"sample_size": [2, 3, 16, 16]}
    else:
        config = transformers.DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=4, hidden_dim=24)
        model = transformers.DistilBertModel(config)
    params = {
        "warmup_start_epoch": 0,
        "warmup_end_epoch": 1,
        "importance_regularization_factor": 0.1,
        "steps_per_epoch": 2,
    }
    movement = {"algorithm": "movement_sparsity", "params": params}
    controller, model = create_compressed_model(model, {"input_info": tokens, "compression": movement})
    shapes = [(each.units, len(each.rows), len(each.columns)) for each in controller.structures]
    expected = {
        "bert": [(4, 3, 1), (24, 1, 1)],
        "vit": [(4, 3, 1), (24, 1, 1)],
        "distilbert": [(4, 3, 1), (24, 1, 1)],
        "llama": [(2, 3, 1), (24, 2, 1)],
        "qwen": [(2, 3, 1), (24, 2, 1)],
        "gpt2": [],  # whose layers are no linear layers, but transformers' Conv1D
    }[kind]
    assert sorted(shapes) == sorted(expected)
    assert getattr(model.config, "use_cache", None) in (True, None, False)


def test_the_configuration_of_a_language_model_stays() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24
    )
    model = transformers.LlamaForCausalLM(config)
    params = {
        "warmup_start_epoch": 0,
        "warmup_end_epoch": 1,
        "importance_regularization_factor": 0.1,
        "steps_per_epoch": 2,
    }
    info = {"sample_size": [2, 6], "type": "long"}
    create_compressed_model(
        model, {"input_info": info, "compression": {"algorithm": "movement_sparsity", "params": params}}
    )
    assert model.config.use_cache is True


@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "densenet", "fpn", "transposed", "recurrent", "normalized", "tied"]
)
def test_pruned_and_quantized_models_are_exported(name: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    import onnxruntime

    shape = ARCHITECTURES[name][1]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    config = {
        "input_info": {"sample_size": list(shape), "filler": "random"},
        "compression": [
            {"algorithm": "filter_pruning", "pruning_init": 0.5, "params": EVERYTHING},
            {"algorithm": "quantization", "overflow_fix": "enable"},
        ],
    }
    controller, model = create_compressed_model(make(name), register_default_init_args(config, [x]))
    model.eval()
    controller.export_model(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = tree_leaves(model(x))
    for mine, its in zip(found, expected, strict=True):
        # Sums in another order may end on the other side of a rounding, here and there.
        error = (torch.from_numpy(mine) - its).abs()
        assert float(error.mean()) < 0.02 * float(its.abs().max())
