"""A method of one's own against the older interface: one object with model, loss and scheduler.

Weights decay towards a grid of ``levels`` values: the loss is their distance to it, and the scheduler raises
the loss's weight from epoch to epoch. What the method does not define, it has from the base.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import DigitsCNN, accuracy, batches, load_data, train
from torch import Tensor, nn

from coreai_opt.controllers import CompressionAlgorithm
from coreai_opt.controllers.nncf1 import CompressionLoss, CompressionScheduler


def on_grid(weight: Tensor, levels: int) -> Tensor:
    """The nearest of ``levels`` values, evenly spaced from minus to plus the largest magnitude."""
    step = 2 * weight.detach().abs().max().clamp(min=1e-12) / (levels - 1)
    return torch.round(weight.detach() / step) * step


class GridLoss(CompressionLoss):
    """Mean squared distance of the weights to their grids, times ``factor``."""

    def __init__(self, model: nn.Module, levels: int) -> None:
        super().__init__(model)
        self.layers = [each for each in model.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
        self.levels, self.factor = levels, 0.0

    def forward(self) -> Tensor:
        parts = [F.mse_loss(each.weight, on_grid(each.weight, self.levels)) for each in self.layers]
        return self.factor * torch.stack(parts).sum()


class GridScheduler(CompressionScheduler):
    """Raises the factor after each epoch."""

    def __init__(self, loss: GridLoss) -> None:
        super().__init__()
        self.loss = loss

    def epoch_step(self, last: int | None = None) -> None:
        super().epoch_step(last)
        self.loss.factor = 10.0 * self.last_epoch


class GridMethod(CompressionAlgorithm):
    """The method: ``config`` is ``{"levels": odd number}``."""

    def __init__(self, model: nn.Module, config: dict[str, Any], input_size: tuple[int, ...]) -> None:
        super().__init__(model, config, input_size)
        self._loss = GridLoss(model, config["levels"])
        self._scheduler = GridScheduler(self._loss)

    def prepare_for_export(self, model: nn.Module) -> nn.Module:
        """Put the weights of the copy that is exported onto their grids."""
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    layer.weight.copy_(on_grid(layer.weight, self.config["levels"]))
        return model


def run(epochs: int, images: int | None, onnx: Path | None) -> GridMethod:
    torch.manual_seed(0)
    data, model = load_data(seed=0), DigitsCNN()
    train(model, data, min(epochs, 5))
    algorithm = GridMethod(model, {"levels": 15}, input_size=(1, 1, 8, 8))
    optimizer = torch.optim.Adam(algorithm.model.parameters(), lr=1e-3)
    for epoch in range(epochs):
        algorithm.model.train()
        for inputs, labels in batches(data, epoch)[: None if images is None else max(images // 64, 1)]:
            loss = F.cross_entropy(algorithm.model(inputs), labels) + algorithm.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            algorithm.scheduler.step()
        algorithm.scheduler.epoch_step()
        print(f"epoch {epoch}: {algorithm.statistics()}")
    print(f"test accuracy {accuracy(algorithm.model, data):.2%}")
    if onnx is not None:
        algorithm.export_model(onnx)
    return algorithm


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int)
    parser.add_argument("--onnx", type=Path)
    options = parser.parse_args()
    run(options.epochs, options.images, options.onnx)
