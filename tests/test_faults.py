"""What goes wrong around training: a disk that is full, losses that are not finite."""

import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import coreai_opt
from coreai_opt.pruning import MagnitudePruner, MagnitudePrunerConfig, ModuleMagnitudePrunerConfig
from coreai_opt.pruning.config import PolynomialDecaySchedule
from coreai_opt.pruning.spec import PruningSpec
from coreai_opt.quantization import Quantizer, QuantizerConfig

STEPS = 40


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 16, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def prepared() -> tuple[nn.Module, MagnitudePruner, Quantizer]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    entry = ModuleMagnitudePrunerConfig(
        op_state_spec={"weight": PruningSpec(target_sparsity=0.5)},
        sparsity_schedule=PolynomialDecaySchedule(total_iters=STEPS),
    )
    pruner = MagnitudePruner(model, MagnitudePrunerConfig(global_config=entry))
    pruner.prepare(batch()[:1])
    quantizer = Quantizer(model, QuantizerConfig(execution_mode="eager"))
    return quantizer.prepare(batch()[:1]), pruner, quantizer


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore")
def test_a_full_disk_leaves_the_checkpoint_of_before(tmp_path: Path) -> None:
    model, pruner, _ = prepared()
    path = coreai_opt.save_checkpoint(model, tmp_path / "model.safetensors")
    content = path.read_bytes()

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        pruner.step()
        try:
            coreai_opt.save_checkpoint(model, path)
        except Exception:  # noqa: BLE001 - of safetensors; what matters is what is left
            os._exit(3)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=save)
    process.start()
    process.join()
    assert process.exitcode == 3
    assert path.read_bytes() == content
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_overflows_changes_no_weight() -> None:
    """GradScaler leaves out steps with gradients that are not finite; the next ones are as ever."""
    model, pruner, quantizer = prepared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    inputs, labels = batch()
    with quantizer.training_mode():
        for factor in (1.0, float("inf"), float("nan"), 1.0):
            before = {name: each.detach().clone() for name, each in model.named_parameters()}
            loss = nn.functional.cross_entropy(model(inputs), labels) * factor
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            pruner.step()
            changed = any(not torch.equal(before[name], each) for name, each in model.named_parameters())
            assert changed == (factor == 1.0)
    assert all(value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point())
    assert scaler.get_scale() == 256.0
