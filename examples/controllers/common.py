"""What the examples share: a small network, the digits data, and one training loop for all algorithms."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from digits_model import Digits, load_data

from coreai_opt.controllers import create_compressed_model, register_default_init_args

BATCH = 64
torch.set_num_threads(1)  # the network is so small that a second thread mostly waits


class DigitsCNN(nn.Module):
    """Three convolutions, the last two around a skip connection, and a classifier of 10 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.stem_norm = nn.BatchNorm2d(16)
        self.expand = nn.Conv2d(16, 32, 3, padding=1)
        self.expand_norm = nn.BatchNorm2d(32)
        self.contract = nn.Conv2d(32, 16, 3, padding=1)
        self.contract_norm = nn.BatchNorm2d(16)
        self.hidden = nn.Linear(16 * 16, 64)
        self.classify = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(images)))
        y = F.relu(self.expand_norm(self.expand(x)))
        x = F.relu(x + self.contract_norm(self.contract(y)))
        x = F.max_pool2d(x, 2).flatten(1)
        return self.classify(F.relu(self.hidden(x)))


def batches(data: Digits, epoch: int) -> list[tuple[Tensor, Tensor]]:
    """The training images in an order of their own for each epoch."""
    order = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(epoch))
    return [(data.train_images[part], data.train_labels[part]) for part in order.split(BATCH)]


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    model.eval()
    return float((model(data.test_images).argmax(1) == data.test_labels).float().mean())


def train(model: nn.Module, data: Digits, epochs: int, controller: Any = None) -> None:
    """Plain training, or compressed training: the same loop with three more lines."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(epochs):
        model.train()
        if controller is not None:
            controller.scheduler.epoch_step()
        for images, labels in batches(data, epoch):
            if controller is not None:
                controller.scheduler.step()
            loss = F.cross_entropy(model(images), labels)
            if controller is not None:
                loss = loss + controller.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@dataclass(frozen=True)
class Outcome:
    """What became of a model: its controller, test accuracies in [0, 1], and the table that was printed."""

    controller: Any
    model: nn.Module
    accuracy_before: float
    accuracy_compressed: float
    accuracy_stripped: float
    compression_rate: float
    statistics: str
    figures: dict[str, Any]


def compress(algorithms: Sequence[dict[str, Any]], epochs: int, images: int | None = None) -> Outcome:
    """Train, compress and train on, with at most ``images`` images; print and return what came of it."""
    torch.manual_seed(0)
    start = time.perf_counter()
    data, model = load_data(seed=0), DigitsCNN()
    data = replace(data, train_images=data.train_images[:images], train_labels=data.train_labels[:images])
    train(model, data, min(epochs, 5))
    before = accuracy(model, data)

    config = {
        "input_info": {"sample_size": [1, 1, 8, 8]},
        "compression": [dict(algorithm) for algorithm in algorithms],
    }
    controller, model = create_compressed_model(model, register_default_init_args(config, batches(data, 0)))
    train(model, data, epochs, controller)
    after, stripped = accuracy(model, data), accuracy(controller.strip(), data)
    statistics, rate = controller.statistics(), controller.compression_rate
    print(statistics.to_str())
    print(f"compression rate {rate:.3f}, {controller.compression_stage().name}")
    print(f"test accuracy {before:.2%} before, {after:.2%} compressed, {stripped:.2%} stripped")
    print(f"{time.perf_counter() - start:.1f} s")
    return Outcome(
        controller, model, before, after, stripped, rate, statistics.to_str(), statistics.to_dict()
    )


def run(*algorithms: dict[str, Any], arguments: list[str] | None = None) -> tuple[Any, nn.Module]:
    """The command line of an example; returns the controller and the compressed model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=8, help="epochs of compressed training")
    parser.add_argument("--images", type=int, help="train on so many images only")
    parser.add_argument("--onnx", type=Path, help="write the compressed model to this file")
    options = parser.parse_args(arguments)
    outcome = compress(algorithms, options.epochs, options.images)
    if options.onnx is not None:
        outcome.controller.export_model(options.onnx)
    return outcome.controller, outcome.model
