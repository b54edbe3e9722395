"""Architectures of transformers, with weights and activations quantized, padding included, from folders."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import coreai_opt  # noqa: E402
from coreai_opt.integrations.transformers import save_pretrained  # noqa: E402

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
        {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))},
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


@pytest.mark.parametrize("name", ARCHITECTURES)
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
