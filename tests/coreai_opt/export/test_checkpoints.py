"""Checkpoints with quantized weights: transformers loads them, and training goes on from them."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from coreai_opt.export import load_checkpoint, load_quantization, save, save_checkpoint
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity, QuantizationSpec
from tests.coreai_opt.export.models import cnn, example, mlp, output, pruner, quantizer

CHANNELS = PerChannelGranularity(axis=0)
GROUPS = PerBlockGranularity(axis=1, block_size=32)
IDS = torch.arange(12).reshape(1, 12)


def llama(seed=0, tied=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def prepared(weight, activation=None, **kwargs):
    model = llama(**kwargs)
    inputs = None if activation is None else {0: QuantizationSpec(**activation)}
    config = QuantizerConfig(
        global_config=None,
        module_type_configs={
            nn.Linear: ModuleQuantizerConfig(
                op_state_spec={"weight": QuantizationSpec(**weight)},
                op_input_spec=inputs,
                op_output_spec=None,
            )
        },
        execution_mode="eager",
    )
    return Quantizer(model, config).prepare((IDS,))


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


CASES = {
    "int4 in groups": ({"dtype": "int4", "granularity": GROUPS}, None, "pack-quantized"),
    "int8 per channel": ({"granularity": CHANNELS}, None, "pack-quantized"),
    "int8 asymmetric": ({"qscheme": "asymmetric", "granularity": CHANNELS}, None, "int-quantized"),
    "int8 weights and inputs": ({"granularity": CHANNELS}, {}, "int-quantized"),
    "asymmetric inputs": (
        {"granularity": CHANNELS}, {"dtype": "uint8", "qscheme": "asymmetric"}, "int-quantized",
    ),
    "float8": ({"dtype": "float8_e4m3fn", "granularity": CHANNELS}, None, "float-quantized"),
    "float8 weights and inputs": (
        {"dtype": "float8_e4m3fn"}, {"dtype": "float8_e4m3fn"}, "float-quantized",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, tmp_path):
    """transformers computes what the prepared model does; so does a model that loads it and is prepared."""
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    from transformers import AutoModelForCausalLM

    weight, activation, fmt = CASES[case]
    model = prepared(weight, activation)
    expected, keys = logits(model), list(model.state_dict())
    folder = save_checkpoint(model, tmp_path / "checkpoint")
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), expected)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == fmt
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(theirs), expected)

    ours = llama(seed=1)
    loaded = load_checkpoint(ours, folder)
    if activation is None:
        assert torch.equal(logits(ours), expected)
    again = Quantizer(ours, loaded).prepare((IDS,))
    load_quantization(again, folder)
    assert torch.equal(logits(again), expected)
    second = save_checkpoint(again, tmp_path / "again")
    assert (second / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


SCALED = {
    "mxfp4": {"dtype": "float4_e2m1fn", "scale_dtype": "float8_e8m0fnu", "granularity": GROUPS},
    "mxfp8": {"dtype": "float8_e4m3fn", "scale_dtype": "float8_e8m0fnu", "granularity": GROUPS},
    "nvfp4": {
        "dtype": "float4_e2m1fn",
        "scale_dtype": "float8_e4m3fn",
        "granularity": PerBlockGranularity(axis=1, block_size=16),
    },
}


@pytest.mark.parametrize("case", SCALED)
def test_rounded_scales(case, tmp_path):
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    from transformers import AutoModelForCausalLM

    model = prepared(SCALED[case])
    folder = save_checkpoint(model, tmp_path / "checkpoint")
    ours = llama(seed=1)
    config = load_checkpoint(ours, folder)
    if case == "nvfp4":
        torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(logits(ours), logits(model))
    plain = {name: value.clone() for name, value in ours.state_dict().items()}
    again = Quantizer(ours, config).prepare((IDS,))
    load_quantization(again, folder)
    second = save_checkpoint(again, tmp_path / "again")
    assert (second / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    for name, value in plain.items():
        assert torch.equal(again.get_submodule(name.rpartition(".")[0]).weight, value)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert (logits(theirs) - logits(model)).abs().max() < 0.02  # and decompresses the weights
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(theirs.get_parameter(name), plain[name].bfloat16())


def test_packed_zero_points_are_told_and_come_back(tmp_path):
    """transformers does not load them."""
    model = prepared({"dtype": "uint4", "qscheme": "asymmetric", "granularity": GROUPS})
    with pytest.warns(UserWarning, match=r"8 layers .*packed zero points: transformers 5\.23"):
        folder = save_checkpoint(model, tmp_path / "checkpoint")
    ours = llama(seed=1)
    load_checkpoint(ours, folder)
    assert torch.equal(logits(ours), logits(model))


def test_files_are_smaller(tmp_path):
    def size(weight):
        name = str(weight.get("dtype"))
        folder = save_checkpoint(prepared(weight), tmp_path / name)
        return (folder / "model.safetensors").stat().st_size

    dense = sum(each.numel() * 4 for each in llama().parameters())
    embedding = 64 * 64 * 4
    assert size({"dtype": "int8", "granularity": CHANNELS}) < 0.35 * (dense - embedding) + embedding
    assert size({"dtype": "int4", "granularity": GROUPS}) < 0.25 * (dense - embedding) + embedding


def test_shared_weights_are_refused_unless_they_are_ignored(tmp_path):
    model = llama(tied=True)
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(
            op_state_spec={"weight": QuantizationSpec(granularity=CHANNELS)},
            op_input_spec=None,
            op_output_spec=None,
        ),
        execution_mode="eager",
    )
    model = Quantizer(model, config).prepare((IDS,))
    with pytest.raises(ValueError, match=r"shared by the modules .*ignore="):
        save_checkpoint(model, tmp_path / "checkpoint")
    assert not any(tmp_path.iterdir())
    ignored = ["model.embed_tokens", "lm_head"]
    norms = [name for name, module in model.named_modules() if "norm" in name and hasattr(module, "weight")]
    save_checkpoint(model, tmp_path / "checkpoint", ignore=[*ignored, *norms])
    with safe_open(tmp_path / "checkpoint" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names
    assert "model.layers.0.mlp.up_proj.weight_packed" in names


def test_a_single_file(tmp_path):
    model = mlp()
    quantizer(model, {"dtype": "int4", "granularity": GROUPS})
    expected = output(model)
    path = tmp_path / "model.safetensors"
    saved = save(model, path, example(model), progress=False)
    assert saved.difference == 0
    with safe_open(path, framework="pt") as file:
        assert "0.weight_packed" in set(file.keys())
        assert json.loads(file.metadata()["quantization_config"])["format"] == "pack-quantized"
    other = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    load_checkpoint(other, path)
    assert torch.equal(output(other), expected)


def test_other_compressions_are_stored_dense(tmp_path):
    model = mlp()
    pruner(model)
    expected = output(model)
    path = tmp_path / "model.safetensors"
    save(model, path, example(model), progress=False)
    other = mlp()
    assert load_checkpoint(other, path).module_name_configs == {}
    assert torch.equal(output(other), expected)


REFUSED = {
    "a convolution": (cnn, {}, None, "Linear and Embedding"),
    "outputs": (mlp, {}, {}, "linear_quantize_output_0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_stored_is_refused(case, tmp_path):
    make, weight, activation, message = REFUSED[case]
    model = make()
    quantizer(model, weight, activation)
    with pytest.raises(ValueError, match=message):
        save(model, tmp_path / "model.safetensors", example(model), progress=False)
    assert not any(tmp_path.iterdir())


def test_bad_arguments(tmp_path):
    with pytest.raises(TypeError, match="transformers"):
        save_checkpoint(mlp(), tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="folder"):
        save_checkpoint(llama(), tmp_path / "file")
    with pytest.raises(FileExistsError, match="folder"):
        save_checkpoint(llama(), tmp_path)
    with pytest.raises(ValueError, match=r"ignore.*'nothing'"):
        save_checkpoint(llama(), tmp_path / "new", ignore=["nothing"])
    with pytest.raises(FileNotFoundError, match="path"):
        load_checkpoint(mlp(), tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_checkpoint(mlp(), tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_checkpoints_that_do_not_fit_change_nothing(tmp_path):
    model = mlp()
    quantizer(model, {"granularity": CHANNELS})
    path = tmp_path / "model.safetensors"
    save(model, path, example(model), progress=False)
    other = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"of another shape \['2\.bias"):
        load_checkpoint(other, path)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    with pytest.raises(ValueError, match="before prepare"):
        load_checkpoint(model, path)
    per_tensor = mlp()
    quantizer(per_tensor, {})
    with pytest.raises(RuntimeError, match="32 scales, the simulator 1"):
        load_quantization(per_tensor, path)
    with pytest.raises(RuntimeError, match="no simulator here"):
        load_quantization(mlp(), path)


def _group(**changes):
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", **changes.pop("weights", {})}
    return {"targets": ["Linear"], "weights": weights, "format": "int-quantized", **changes}


MALFORMED = {
    "no groups": ({}, "config_groups: Field required"),
    "groups in a list": ({"config_groups": []}, "config_groups: Input should be a valid dict"),
    "no targets": (
        {"config_groups": {"g": {"weights": {"num_bits": 8}}}}, r"config_groups\.g\.targets: Field required",
    ),
    "a broken pattern": (
        {"config_groups": {"g": _group(targets=["re:("])}}, r"targets\.0: .*'\(' is no regular expression",
    ),
    "a broken pattern to ignore": ({"config_groups": {}, "ignore": ["re:["]}, "is no regular expression"),
    "bits": ({"config_groups": {"g": _group(weights={"num_bits": "many"})}}, r"g\.weights\.num_bits"),
    "type": ({"config_groups": {"g": _group(weights={"type": "complex"})}}, r"g\.weights\.type"),
    "groups without a size": (
        {"config_groups": {"g": _group(weights={"strategy": "group"})}}, "needs a group_size; got None",
    ),
    "blocks without extents": (
        {"config_groups": {"g": _group(weights={"strategy": "block"})}}, "needs a block_structure",
    ),
    "no format": ({"config_groups": {"g": _group(format=None)}}, "'g' of config_groups has a format"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_configurations_that_cannot_be_read_are_told(case, tmp_path):
    config, message = MALFORMED[case]
    model = mlp()
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "compressed-tensors", **config}})
    )
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for load in (load_checkpoint, load_quantization):
        with pytest.raises(ValueError, match=rf"quantization_config of .* cannot be read: .*{message}"):
            load(model, tmp_path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"quantization_config": 3}', "{"])
def test_a_config_that_is_none_is_told(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    save_file(dict(mlp().state_dict()), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"quantization_config|Expecting"):
        load_checkpoint(mlp(), tmp_path)
