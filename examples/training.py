"""How the examples train: one loop, with places for what a compression does in it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from digits_model import Digits
from torch import Tensor, nn
from tqdm import tqdm

BATCH = 256


@dataclass
class History:
    """Training losses, one a step, and test accuracies, one an epoch."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Scores of the ten digits for each image."""
    return model.eval()(images)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return (scores.argmax(1) == labels).float().mean().item()


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> Tensor:
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def train(
    model: nn.Module,
    data: Digits,
    title: str,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    weight_decay: float = 0.3,
    mode: Callable[[], AbstractContextManager[None]] = nullcontext,
    after_step: Callable[[], None] = lambda: None,
) -> History:
    """Train ``model`` in place. The seed alone decides the order of the images.

    ``mode`` makes a context for the steps of an epoch; the tests between epochs run outside of it.
    """
    shuffling = torch.Generator().manual_seed(seed)
    steps = len(data.train_labels) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * steps)
    history = History()
    with tqdm(total=epochs * steps, desc=f"{title:<13}", unit="step") as progress:
        for _ in range(epochs):
            model.train()
            order = torch.randperm(len(data.train_labels), generator=shuffling)
            with mode():
                for batch in order.split(BATCH)[:steps]:
                    loss = training_step(model, optimizer, data.train_images[batch], data.train_labels[batch])
                    schedule.step()
                    after_step()
                    history.losses.append(loss.item())
                    progress.update()
            history.accuracies.append(accuracy(predict(model, data.test_images), data.test_labels))
            progress.set_postfix(loss=f"{history.losses[-1]:.4f}", test=f"{history.accuracies[-1]:.2%}")
    return history
