"""A Trainer's checkpoints in the middle of schedules: who goes on from one has the uninterrupted run."""

import warnings

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from coreai_opt.controllers import create_compressed_model  # noqa: E402
from coreai_opt.integrations.transformers import CompressionCallback  # noqa: E402
from coreai_opt.palettization import (  # noqa: E402
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
)
from coreai_opt.pruning import (  # noqa: E402
    MagnitudePruner,
    MagnitudePrunerConfig,
    ModuleMagnitudePrunerConfig,
)
from coreai_opt.pruning.config import PolynomialDecaySchedule  # noqa: E402
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig  # noqa: E402
from coreai_opt.quantization.config import QATSchedule  # noqa: E402


class Network(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(nn.Conv1d(1, 4, 1), nn.ReLU(), nn.Conv1d(4, 2, 3, padding=1))
        self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.body(self.stem(x.unsqueeze(1)).flatten(1)))


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"x": torch.randn(8, generator=torch.Generator().manual_seed(index))}


class Trainer(transformers.Trainer):
    controllers = ()

    def compute_loss(self, model, inputs, **_):
        loss = model(inputs["x"]).square().mean()
        for each in self.controllers:
            loss = loss + each.loss()
        return loss


EXAMPLE = torch.ones(2, 8)


def pruned_and_quantized(seed):
    model = Network(seed)
    schedule = PolynomialDecaySchedule(begin_step=1, total_iters=6)
    config = MagnitudePrunerConfig(global_config=ModuleMagnitudePrunerConfig(sparsity_schedule=schedule))
    pruner = MagnitudePruner(model, config)
    pruner.prepare((EXAMPLE,))
    return quantized(seed, model, "eager", pruner)


def quantized(seed, model=None, mode="graph", *others):
    schedule = QATSchedule(enable_fake_quant=3, disable_observer=6)
    config = QuantizerConfig(global_config=ModuleQuantizerConfig(qat_schedule=schedule), execution_mode=mode)
    quantizer = Quantizer(model or Network(seed), config)
    batch = torch.export.Dim.DYNAMIC
    shapes = {"x": {0: batch}} if mode == "graph" else None
    return quantizer.prepare((EXAMPLE,), shapes), *others, quantizer


def palettized(seed):
    model = Network(seed)
    palettizer = KMeansPalettizer(model, KMeansPalettizerConfig(global_config=ModuleKMeansPalettizerConfig()))
    return palettizer.prepare((EXAMPLE,)), palettizer


def controlled(*algorithms):
    def make(seed):
        config = {"input_info": {"sample_size": [2, 8]}, "compression": list(algorithms)}
        torch.manual_seed(seed)
        controller, model = create_compressed_model(Network(seed), config)
        return model, controller

    return make


def rising(algorithm, **params):
    levels = {"sparsity_target": 0.6, "sparsity_target_epoch": 2, "sparsity_freeze_epoch": 3}
    return {"algorithm": algorithm, "params": {"schedule": "polynomial", **levels, **params}}


RUNS = {
    "pruned, then quantized": pruned_and_quantized,
    "quantized in graph mode": quantized,
    "palettized": palettized,
    "magnitude": controlled(rising("magnitude_sparsity")),
    "magnitude by steps": controlled(
        rising("magnitude_sparsity", update_per_optimizer_step=True, steps_per_epoch=3)
    ),
    "adaptive": controlled(rising("magnitude_sparsity", schedule="adaptive", patience=1)),
    "filters": controlled(
        {
            "algorithm": "filter_pruning",
            "params": {
                "schedule": "exponential",
                "pruning_target": 0.5,
                "pruning_steps": 3,
                "prune_first_conv": True,
            },
        }
    ),
    "regularised": controlled(rising("rb_sparsity")),
    "two algorithms": controlled(
        rising("magnitude_sparsity"),
        {
            "algorithm": "quantization",
            "initializer": {
                "range": {"num_init_samples": 0},
                "batchnorm_adaptation": {"num_bn_adaptation_samples": 0},
            },
        },
    ),
}


def train(folder, make, seed=0, resume=None, callbacks=None, **options):
    model, *parts = make(seed)
    # Learned masks draw random numbers: a resumed run has the generator's state from the checkpoint.
    torch.manual_seed(0)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=11,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_steps=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        label_names=[],
        learning_rate=1e-2,
        **options,
    )
    given = [CompressionCallback(*parts)] if callbacks is None else callbacks(*parts)
    trainer = Trainer(model, arguments, train_dataset=Data(), callbacks=given)
    trainer.controllers = given[0].loop.controllers
    trainer.train(resume_from_checkpoint=resume)
    logs = [
        {name: entry[name] for name in entry if name == "loss" or name.startswith("compression/")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return model, given[0].loop.state_dict()["parts"], logs


# An epoch has 3 steps: training goes on within the second, or the third.
@pytest.mark.parametrize(
    ("run", "steps"), [*((run, 4) for run in RUNS), ("adaptive", 8), ("two algorithms", 8)]
)
def test_a_resumed_run_is_the_uninterrupted_one(run, steps, tmp_path):
    model, states, logs = train(tmp_path, RUNS[run])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*another configuration|.*configuration has changed")
        resumed, again, tail = train(
            tmp_path, RUNS[run], seed=5, resume=str(tmp_path / f"checkpoint-{steps}")
        )
    assert again == states
    assert tail == logs  # those before the checkpoint are in it
    state = resumed.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    model.eval(), resumed.eval()
    with torch.no_grad():
        assert torch.equal(resumed(EXAMPLE), model(EXAMPLE))


def test_what_a_resumed_run_refuses(tmp_path):
    train(tmp_path, quantized)
    checkpoint = str(tmp_path / "checkpoint-4")
    with pytest.raises(
        ValueError, match=r"saved with Quantizer \(1 in all\), the callback has KMeansPalettizer"
    ):
        train(tmp_path, lambda seed: (quantized(seed)[0], palettized(seed)[1]), resume=checkpoint)
    with pytest.raises(ValueError, match="several CompressionCallbacks: give all"):
        train(
            tmp_path, quantized, callbacks=lambda part: [CompressionCallback(part), CompressionCallback(part)]
        )
    with pytest.raises(ValueError, match="leave restore_callback_states_from_checkpoint"):
        train(tmp_path, quantized, resume=checkpoint, restore_callback_states_from_checkpoint=True)


def test_a_checkpoint_without_a_state_goes_on(tmp_path):
    train(tmp_path, palettized, callbacks=lambda part: [Plain(part)])
    _, states, _ = train(tmp_path, palettized, resume=str(tmp_path / "checkpoint-4"))
    # As many steps as the resumed run has made itself.
    assert states[0]["step_count"] == 7
    assert (tmp_path / "checkpoint-11").is_dir()


class Plain(transformers.TrainerCallback):
    """Trains with compression, and saves nothing."""

    def __init__(self, part):
        self.loop = CompressionCallback(part).loop
