"""Lightning's Trainer follows the schedules of compressors and controllers, and takes them up again."""

import pytest
import torch
from torch import nn

lightning = pytest.importorskip("lightning")

from coreai_opt.controllers import create_compressed_model  # noqa: E402
from coreai_opt.integrations.lightning import CompressionCallback  # noqa: E402
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig  # noqa: E402
from coreai_opt.quantization.config import QATSchedule  # noqa: E402

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


class Task(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        return self.model(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=2)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def quantized():
    model = network()
    config = ModuleQuantizerConfig(qat_schedule=QATSchedule(enable_fake_quant=2, disable_observer=4))
    quantizer = Quantizer(model, QuantizerConfig(global_config=config, execution_mode="eager"))
    return quantizer.prepare((X,)), quantizer


def fit(task, callback, path=None, **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(task, ckpt_path=path, **({"weights_only": False} if path else {}))
    return trainer


def test_steps_are_those_of_the_optimizer(tmp_path):
    model, quantizer = quantized()
    trainer = fit(Task(model), CompressionCallback(quantizer), max_epochs=1, accumulate_grad_batches=2)
    assert quantizer.state_dict()["step_count"] == trainer.global_step == 4
    assert trainer.callback_metrics["compression/observing"] == 0
    assert trainer.callback_metrics["compression/quantized"] == 1
    trainer.save_checkpoint(tmp_path / "task.ckpt")
    fresh, other = quantized()
    trainer = fit(
        Task(fresh),
        CompressionCallback(other),
        tmp_path / "task.ckpt",
        max_epochs=2,
        accumulate_grad_batches=2,
    )
    assert other.state_dict()["step_count"] == trainer.global_step == 8


def test_a_controllers_schedule():
    config = {
        "input_info": {"sample_size": [1, 8]},
        "compression": {
            "algorithm": "magnitude_sparsity",
            "params": {"schedule": "polynomial", "sparsity_target": 0.5, "sparsity_target_epoch": 2},
        },
    }
    controller, model = create_compressed_model(network(), config)
    trainer = fit(Task(model), CompressionCallback(controller), max_epochs=4)
    assert (controller.scheduler.current_epoch, controller.scheduler.current_step) == (3, 31)
    assert trainer.callback_metrics["compression/magnitude_sparsity/rate"] == pytest.approx(0.5, abs=0.03)
