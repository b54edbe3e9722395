"""Architectures of transformers, with weights and activations quantized, padding included, from folders."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import coreai_opt  # noqa: E402
from coreai_opt.integrations.transformers import (  # noqa: E402
    CompressionConfig,
    compressors_of,
    save_pretrained,
)

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 9, dtype=torch.long)
MASK[1, 6:] = 0
TEXT = {"input_ids": IDS, "attention_mask": MASK}
BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
LLAMA = BERT | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
# Model and configuration, arguments, inputs, and the least share of parameters that is to be covered.
ARCHITECTURES = {
    "GPT2LMHeadModel": ("GPT2Config", GPT2, TEXT, 0.75),
    "LlamaForCausalLM": ("LlamaConfig", LLAMA, TEXT, 0.8),
    "Qwen2ForCausalLM": ("Qwen2Config", LLAMA | {"tie_word_embeddings": True}, TEXT, 0.8),
    "MixtralForCausalLM": ("MixtralConfig", LLAMA | {"num_local_experts": 4}, TEXT, 0.9),
    "GptOssForCausalLM": ("GptOssConfig", LLAMA | {"num_local_experts": 4, "head_dim": 8}, TEXT, 0.85),
    "BertForSequenceClassification": ("BertConfig", BERT, TEXT, 0.65),
    "T5ForConditionalGeneration": (
        "T5Config",
        T5 | {"decoder_start_token_id": 0},
        {**TEXT, "labels": IDS},
        0.8,
    ),
    # Its layers have other names in files.
    "ViTForImageClassification": (
        "ViTConfig",
        VIT | {"image_size": 16, "patch_size": 8},
        PIXELS,
        0.8,
    ),
    "ConvNextForImageClassification": (
        "ConvNextConfig",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 16},
        PIXELS,
        0.8,
    ),
    "FalconForCausalLM": ("FalconConfig", {**BERT, "num_hidden_layers": 1}, TEXT, 0.8),
    "OPTForCausalLM": (
        "OPTConfig",
        {**BERT, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 32},
        TEXT,
        0.7,
    ),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        {
            "vocab_size": 64,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_source_positions": 20,
            "max_target_positions": 32,
            "num_mel_bins": 8,
            "pad_token_id": 0,
            "decoder_start_token_id": 1,
        },
        {
            "input_features": torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(2)),
            "decoder_input_ids": IDS,
        },
        0.8,
    ),
}


def make(name):
    config, arguments, inputs, coverage = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)._from_config(
        getattr(transformers, config)(**arguments), attn_implementation="eager"
    )
    return model.eval(), inputs, coverage


# The others have tests of their own.
OTHERS = ("FalconForCausalLM", "OPTForCausalLM", "WhisperForConditionalGeneration")


@pytest.mark.parametrize("name", [each for each in ARCHITECTURES if each not in OTHERS])
def test_weights_and_activations(name, tmp_path):
    model, inputs, coverage = make(name)
    with torch.no_grad():
        expected = model(**inputs).logits
    model, quantizer = coreai_opt.quantize(model, inputs, "w8a8", head=True)
    assert quantizer.summary().coverage >= coverage
    with torch.no_grad():
        found = model(**inputs).logits
    assert found.isfinite().all()
    if name != "ViTForImageClassification":  # whose first token is next to 0 before training
        assert (found - expected).norm() < 0.1 * expected.norm()
    with quantizer.training_mode():
        model(**inputs).logits.square().mean().backward()
    assert all(each.grad.isfinite().all() for each in model.parameters() if each.grad is not None)
    model.eval()
    save_pretrained(model, tmp_path)
    back = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(back(**inputs).logits, model(**inputs).logits)


def test_blocks_lie_along_the_inputs_of_unusual_weights():
    model, inputs, _ = make("GPT2LMHeadModel")
    coreai_opt.quantize(model, inputs, "w4")
    layer = model.transformer.h[0].mlp.c_fc
    assert tuple(layer.parametrizations.weight[0].qparams_calculator.scale.shape) == (1, 128)
    for name, axis in (("MixtralForCausalLM", 2), ("GptOssForCausalLM", 1)):
        model, inputs, _ = make(name)
        coreai_opt.quantize(model, inputs, "w4")
        experts = model.model.layers[0].mlp.experts
        shape = list(experts.down_proj.shape)
        shape[axis] //= 32
        assert list(experts.parametrizations.down_proj[0].qparams_calculator.scale.shape) == shape


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "MixtralForCausalLM", "GptOssForCausalLM"])
def test_they_are_pruned_and_palettized(name):
    model, inputs, coverage = make(name)
    coreai_opt.prune(model, inputs, "2:4", head=True, finalize="torch")
    stacked = [
        each for each in model.modules() if type(each).__name__ == "Conv1D" or hasattr(each, "down_proj")
    ]
    for module in stacked:
        weight = module.weight if hasattr(module, "nf") else module.down_proj
        axis = {"GPT2LMHeadModel": 0, "MixtralForCausalLM": 2, "GptOssForCausalLM": 1}[name]
        groups = weight.movedim(axis, -1).reshape(-1, 4)
        assert ((groups == 0).sum(1) == 2).all()
    model, inputs, _ = make(name)
    _, palettizer = coreai_opt.palettize(model, inputs, 4, head=True)
    assert palettizer.summary().coverage >= coverage


def test_weights_that_are_transposed_to_multiply_by_them():
    # Falcon's linear layers are written x @ weight.T.
    for compress, how in (
        (coreai_opt.quantize, "w4"),
        (coreai_opt.quantize, "w8a8"),
        (coreai_opt.prune, "2:4"),
        (coreai_opt.palettize, 4),
    ):
        model, inputs, coverage = make("FalconForCausalLM")
        model, compressor = compress(model, inputs, how)
        assert compressor.summary().coverage >= coverage
        layer = model.transformer.h[0].mlp.dense_4h_to_h
        assert not torch.equal(layer.weight, layer.parametrizations.weight.original)
        with torch.no_grad():
            simulated = model(**inputs).logits
            assert torch.equal(compressor.finalize(backend="torch")(**inputs).logits, simulated)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GptOssForCausalLM"])
def test_generation_with_a_static_cache(name):
    # Caches add positions, which are integers, as often as they like.
    model, inputs, _ = make(name)
    model, _ = coreai_opt.quantize(model, inputs, "w8a8")
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    dynamic = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, cache_implementation="static", **options), dynamic)


def test_a_forward_without_a_mask_after_one_with():
    model, inputs, _ = make("OPTForCausalLM")
    model, _ = coreai_opt.quantize(model, {"input_ids": IDS}, "w8a8")
    assert model(**inputs).logits.isfinite().all()
    assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize("name", ["ConvNextForImageClassification", "WhisperForConditionalGeneration"])
def test_models_of_images_and_sound_are_compressed_as_they_load(name, tmp_path):
    model, inputs, coverage = make(name)
    model.save_pretrained(tmp_path)
    config = CompressionConfig("w8a8")
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config)
    (quantizer,) = compressors_of(loaded)
    assert quantizer.summary().coverage >= coverage
    assert quantizer.summary().activations
    # Calibrated on data of one's own.
    config = CompressionConfig("w8a8", inputs=[inputs])
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config, attn_implementation="eager")
    expected, _ = coreai_opt.quantize(model, [inputs], "w8a8")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, expected(**inputs).logits)
    loaded.save_pretrained(tmp_path / "again")  # inputs are no part of it


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "ConvNextForImageClassification"])
def test_finalized_models_keep_their_activations_in_folders(name, tmp_path):
    model, inputs, _ = make(name)
    model, quantizer = coreai_opt.quantize(model, inputs, "w8a8")
    final = quantizer.finalize(backend="torch")
    save_pretrained(final, tmp_path)
    back = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert compressors_of(back) == ()
    with torch.no_grad():
        expected = final(**inputs).logits
        assert torch.equal(back(**inputs).logits, expected)
        back.save_pretrained(tmp_path / "again")
        again = type(model).from_pretrained(tmp_path / "again", attn_implementation="eager")
        assert torch.equal(again(**inputs).logits, expected)
    # It is no longer one that could be trained, and can be prepared anew.
    assert not any(".parametrizations." in each for each in back.state_dict())
    with pytest.raises(RuntimeError, match="not prepared"):
        coreai_opt.save_checkpoint(back, tmp_path / "file.safetensors")
