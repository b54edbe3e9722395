"""Trains with FSDP2 on as many gloo processes as torchrun starts; not collected: ``test_sharded.py`` runs it.

``torchrun --standalone --nproc-per-node 2 sharded_training.py results.pt``
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from coreai_opt.controllers import create_compressed_model, register_default_init_args

BATCH, EPOCHS, STEPS = 8, 3, 3
RISING = {"schedule": "multistep", "multistep_steps": [1], "multistep_sparsity_levels": [0.3, 0.6]}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "magnitude": {"algorithm": "magnitude_sparsity", "sparsity_init": 0.3, "params": RISING},
    "magnitude, each layer": {
        "algorithm": "magnitude_sparsity",
        "params": {**RISING, "sparsity_level_setting_mode": "local"},
    },
    "rb": {"algorithm": "rb_sparsity", "sparsity_init": 0.3},
    "movement": {
        "algorithm": "movement_sparsity",
        "params": {
            "warmup_start_epoch": 0,
            "warmup_end_epoch": 2,
            "importance_regularization_factor": 0.01,
            "steps_per_epoch": STEPS,
        },
    },
    "const": {"algorithm": "const_sparsity"},
    "int8": {"algorithm": "quantization"},
    "learned ranges": {"algorithm": "quantization", "learnable_ranges": True},
    "palettes": {"algorithm": "palettization", "bits": 3},
    "filters": {
        "algorithm": "filter_pruning",
        "pruning_init": 0.3,
        "params": {"pruning_steps": 2, "prune_first_conv": True, "all_weights": True},
    },
    "distillation": {"algorithm": "knowledge_distillation", "type": "softmax"},
}


def make_model(algorithm: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    if algorithm["algorithm"] == "filter_pruning":
        convolutions = (nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
        return nn.Sequential(
            nn.Unflatten(1, (1, 4, 4)), *convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
        )
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 33), nn.ReLU(), nn.Linear(33, 10))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 16, generator=generator), torch.randint(10, (BATCH,), generator=generator)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(algorithm: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    data = [batch(step) for step in range(STEPS)]
    config = register_default_init_args({"compression": algorithm}, data)
    controller, model = create_compressed_model(make_model(algorithm), config)
    if ranks > 1:
        controller.distributed()
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in model:
            if isinstance(layer, nn.Linear | nn.Conv2d):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for epoch in range(EPOCHS):
        controller.scheduler.epoch_step()
        for step in range(STEPS):
            controller.scheduler.step()
            x, y = (part[rank::ranks] for part in batch(epoch * STEPS + step))
            loss = F.cross_entropy(model(x), y) + controller.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total = loss.detach().clone()
            if ranks > 1:
                dist.all_reduce(total)
            losses.append(float(total) / ranks)
    if ranks > 1:
        try:
            controller.strip(do_copy=False)
        except RuntimeError as error:
            assert "needs whole parameters" in str(error)  # noqa: PT017
        else:
            raise AssertionError("a sharded model was stripped")
    # A checkpoint of whole tensors, in one process.
    state = {name: whole(value).clone() for name, value in model.state_dict().items()}
    resumed, copy = create_compressed_model(make_model(algorithm), config, controller.get_compression_state())
    copy.load_state_dict(state)
    return {
        "losses": losses,
        "statistics": controller.statistics().to_str(),
        "stripped": resumed.strip().state_dict(),
    }


def main(path: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    results = {name: train(algorithm, rank, ranks) for name, algorithm in ALGORITHMS.items()}
    if rank == 0:
        torch.save(results, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
