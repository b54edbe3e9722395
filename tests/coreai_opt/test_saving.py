"""Compressed language models through transformers' save_pretrained and from_pretrained: U4 and U5."""

import pytest
import safetensors.torch
import torch

from coreai_opt import ExportBackend
from coreai_opt.palettization import KMeansPalettizer
from coreai_opt.pruning import MagnitudePruner
from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, Quantizer, QuantizerConfig

transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def language_model(tied, seed=0):
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(**SIZES, tie_word_embeddings=tied)
    return transformers.Qwen2ForCausalLM(config).eval()


def quantizer(model):
    weights = ModuleQuantizerConfig(
        op_state_spec={"weight": QuantizationSpec()}, op_input_spec=None, op_output_spec=None
    )
    return Quantizer(model, QuantizerConfig(global_config=weights, execution_mode="eager"))


COMPRESSORS = [quantizer, MagnitudePruner, KMeansPalettizer]


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_finalized_model_is_saved_and_loaded(compressor, tied, tmp_path):
    language_model(tied).save_pretrained(tmp_path / "float")
    model = language_model(tied)
    before = logits(model)
    made = compressor(model)
    made.prepare((TOKENS,))
    expected = logits(model)
    assert not torch.equal(expected, before)
    made.finalize(backend=ExportBackend.Torch)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "compressed")
    loaded = type(model).from_pretrained(tmp_path / "compressed").eval()
    assert torch.equal(logits(loaded), expected)
    for each in (model, loaded):
        assert (each.get_input_embeddings().weight is each.lm_head.weight) == tied
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("float", "compressed")]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_prepared_model_is_saved_and_resumed(compressor, tied, tmp_path):
    model = language_model(tied)
    compressor(model).prepare((TOKENS,))
    with torch.no_grad():
        model.lm_head.parametrizations.weight.original.add_(0.1)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("lm_head.") for name in state) != tied
    resumed = language_model(tied, seed=1)
    compressor(resumed).prepare((TOKENS,))
    resumed.load_state_dict(state, strict=not tied)
    assert torch.equal(logits(resumed), expected)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_prepare_takes_a_shared_tensor_under_one_of_its_names(compressor, tmp_path):
    model = language_model(tied=True)
    compressor(model).prepare((TOKENS,))
    model.save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    resumed = language_model(tied=True, seed=1)
    compressor(resumed).prepare((TOKENS,), state_dict=state)
    assert torch.equal(logits(resumed), logits(model))
    embedding = resumed.get_input_embeddings().parametrizations.weight.original
    assert embedding is resumed.lm_head.parametrizations.weight.original
