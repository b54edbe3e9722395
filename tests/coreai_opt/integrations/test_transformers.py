"""Models of transformers through folders and a Trainer: the same outputs, the same schedules."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

import coreai_opt  # noqa: E402
from coreai_opt.integrations.transformers import (  # noqa: E402
    CompressionCallback,
    CompressionConfig,
    attach,
    compressors_of,
    save_pretrained,
)
from coreai_opt.pruning import (  # noqa: E402
    MagnitudePruner,
    MagnitudePrunerConfig,
    ModuleMagnitudePrunerConfig,
)
from coreai_opt.pruning.config import PolynomialDecaySchedule  # noqa: E402
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig  # noqa: E402
from coreai_opt.quantization.config import QATSchedule  # noqa: E402

IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(0))


def llama(tied=False, seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", ["w4", "w8a8"])
def test_a_folder_brings_a_prepared_model_back(tied, scheme, tmp_path):
    model, quantizer = coreai_opt.quantize(llama(tied), {"input_ids": IDS}, scheme, head=True)
    save_pretrained(model, tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"]
        == "coreai-opt"
    )
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[each] for each in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(back), logits(model))
    (made,) = compressors_of(back)
    assert made.state_dict() == quantizer.state_dict()
    # And once more, by transformers' own means alone.
    back.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


def test_a_finalized_model_is_a_plain_one(tmp_path):
    model, _ = coreai_opt.quantize(llama(), {"input_ids": IDS}, "w4")
    save_pretrained(model, tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    (quantizer,) = compressors_of(back)
    quantizer.finalize(backend="torch").save_pretrained(tmp_path / "final")
    assert "quantization_config" not in json.loads((tmp_path / "final" / "config.json").read_text())
    final = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert torch.equal(logits(final), logits(model))


def test_two_compressors_in_shards_go_on_at_their_steps(tmp_path):
    model = llama()
    schedule = PolynomialDecaySchedule(begin_step=0, total_iters=10)
    pruner = MagnitudePruner(
        model, MagnitudePrunerConfig(global_config=ModuleMagnitudePrunerConfig(sparsity_schedule=schedule))
    )
    pruner.prepare((IDS,))
    coreai_opt.quantize(model, {"input_ids": IDS}, "w8")
    for _ in range(4):
        pruner.step()
    save_pretrained(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(back), logits(model))
    again, _ = compressors_of(back)
    pruner.step()
    again.step()
    assert again.state_dict() == pruner.state_dict()
    assert torch.equal(logits(back), logits(model))


def test_a_float_model_is_compressed_as_it_loads(tmp_path):
    llama().save_pretrained(tmp_path)
    config = CompressionConfig("w4")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    expected, _ = coreai_opt.quantize(llama(), {"input_ids": IDS}, "w4")
    assert torch.equal(logits(model), logits(expected))


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"scheme must be .*Did you mean 'w4'"):
        CompressionConfig("w44")
    with pytest.raises(ValueError, match="either a scheme"):
        CompressionConfig()
    with pytest.raises(RuntimeError, match="not prepared"):
        save_pretrained(llama(), tmp_path)
    with pytest.raises(TypeError, match="model of transformers"):
        attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="at least one"):
        CompressionCallback()
    with pytest.raises(TypeError, match="got str"):
        CompressionCallback("w4")


def test_embeddings_are_resized_unless_they_are_compressed():
    model, quantizer = coreai_opt.quantize(llama(), {"input_ids": IDS}, "w4")
    with pytest.raises(
        RuntimeError, match=r"resize_token_embeddings: .*Resize the embeddings before prepare"
    ):
        model.resize_token_embeddings(80)
    assert logits(model).shape[-1] == 64
    final = quantizer.finalize(backend="torch")
    final.resize_token_embeddings(80)
    assert logits(final).shape[-1] == 80
    # Neither the embedding nor the head is compressed: as in any other model.
    model, quantizer = coreai_opt.quantize(llama(tied=True), {"input_ids": IDS}, "w4")
    before = quantizer.summary().activations, quantizer.state_dict()
    model.resize_token_embeddings(80)
    assert logits(model).shape[-1] == 80
    assert (quantizer.summary().activations, quantizer.state_dict()) == before


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        ids = torch.randint(0, 64, (7,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def scheduled(seed=0):
    model = llama(seed=seed)
    schedule = PolynomialDecaySchedule(begin_step=0, total_iters=4)
    pruner = MagnitudePruner(
        model, MagnitudePrunerConfig(global_config=ModuleMagnitudePrunerConfig(sparsity_schedule=schedule))
    )
    pruner.prepare((IDS,))
    config = ModuleQuantizerConfig(qat_schedule=QATSchedule(enable_fake_quant=2, disable_observer=4))
    quantizer = Quantizer(model, QuantizerConfig(global_config=config, execution_mode="eager"))
    quantizer.prepare((IDS,))
    return attach(model), pruner, quantizer


def train(folder, model, *compressors, resume=None, steps=6, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_steps=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        learning_rate=1e-3,
        **options,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=Data(),
        eval_dataset=Data(),
        callbacks=[CompressionCallback(*compressors)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_a_trainer_follows_schedules_and_logs_them(tmp_path):
    model, pruner, quantizer = scheduled()
    logs = train(tmp_path, model, pruner, quantizer)
    assert (pruner.state_dict()["step_count"], quantizer.state_dict()["step_count"]) == (6, 6)
    assert [each["compression/quantized"] for each in logs] == [0, 1, 1, 1, 1, 1]
    assert [each["compression/observing"] for each in logs] == [1, 1, 1, 0, 0, 0]
    sparsities = [each["compression/sparsity"] for each in logs]
    assert sparsities == sorted(sparsities)
    assert sparsities[0] < 0.5 == sparsities[3]


def test_a_trainer_resumes_in_the_middle_of_schedules(tmp_path):
    model, *compressors = scheduled()
    logs = train(tmp_path, model, *compressors)
    fresh, *others = scheduled(seed=5)
    resumed = train(tmp_path, fresh, *others, resume=str(tmp_path / "checkpoint-3"))
    assert [each.state_dict() for each in others] == [each.state_dict() for each in compressors]
    assert [each["loss"] for each in resumed][-3:] == [each["loss"] for each in logs][-3:]
    assert torch.equal(logits(fresh), logits(model))


def test_evaluation_moves_no_ranges():
    model, quantizer = coreai_opt.quantize(llama(), {"input_ids": IDS}, "w8a8")

    def ranges():
        return [each.clone() for name, each in model.state_dict().items() if "running_m" in name]

    def moves():
        before = ranges()
        with torch.no_grad():
            model(IDS.flip(1))
        return any(not torch.equal(*pair) for pair in zip(ranges(), before, strict=True))

    with quantizer.training_mode(freeze_in_eval=True):
        assert moves()
        model.eval()
        assert not moves()
        model.train()
        assert moves()
    with quantizer.training_mode():
        model.eval()
        assert moves()
