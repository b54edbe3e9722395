"""Trains on as many gloo processes as torchrun starts; not collected: ``test_distributed.py`` runs it.

``torchrun --standalone --nproc-per-node 2 distributed_training.py results.pt``
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from coreai_opt.controllers import create_compressed_model, register_default_init_args
from coreai_opt.controllers.core.distributed import check_equal_ranks

BATCH, STEPS = 8, 6
ALGORITHMS = [
    {"algorithm": "rb_sparsity", "params": {"sparsity_target_epoch": 1, "sparsity_target": 0.6}},
    {"algorithm": "quantization", "preset": "mixed", "learnable_ranges": True},
    {"algorithm": "knowledge_distillation", "type": "mse"},
]

# Ranges that follow the inputs while training.
OBSERVED = [
    {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 0}}},
    {"algorithm": "magnitude_sparsity", "sparsity_init": 0.3},
]

# Scores that have no effect any more from the second epoch on, and so no gradient.
FROZEN = [
    {
        "algorithm": "movement_sparsity",
        "params": {
            "warmup_start_epoch": 0,
            "warmup_end_epoch": 1,
            "importance_regularization_factor": 0.5,
            "steps_per_epoch": 3,
            "enable_structured_masking": False,
        },
    },
    {"algorithm": "palettization", "bits": 4},
]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 1, 8, 8, generator=generator), torch.randint(10, (BATCH,), generator=generator)


def train(algorithms: list[dict[str, Any]], rank: int, ranks: int) -> dict[str, object]:
    # Each rank initialises from its own share of the data.
    loader = [(batch(-1)[0][rank::ranks], None)]
    config = register_default_init_args({"compression": algorithms}, loader)
    controller, model = create_compressed_model(make_model(), config)
    if ranks > 1:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * rank)  # what went wrong before must not matter
        try:
            check_equal_ranks(controller)
        except RuntimeError as error:
            assert "differ from those of rank 0" in str(error)  # noqa: PT017
        else:
            raise AssertionError("ranks that differ were not noticed")
        controller.distributed()
    wrapped = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(STEPS):
        if step % 3 == 0:
            controller.scheduler.epoch_step()
        controller.scheduler.step()
        x, y = (part[rank::ranks] for part in batch(step))
        loss = F.cross_entropy(wrapped(x), y) + controller.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    check_equal_ranks(controller)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    if rank == 0:  # evaluation on one rank waits for no other
        model.eval()(batch(STEPS)[0])
    return {"model": trained, "losses": torch.stack(losses)}


def main(path: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    results = [train(algorithms, rank, ranks) for algorithms in (ALGORITHMS, OBSERVED, FROZEN)]
    if rank == 0:
        torch.save(results, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # Gloo's threads outlive the group, in models without compression, too. One that lets go of a tensor while
    # Python ends would abort the process ("terminate called without an active exception").
    os._exit(0)
