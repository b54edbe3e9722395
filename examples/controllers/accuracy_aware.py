"""The highest sparsity that costs no more than 2 % of the accuracy, found by the training loop itself."""

import argparse
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from common import DigitsCNN, accuracy, batches, load_data, train
from torch import nn

from coreai_opt.controllers import (
    TrainingReport,
    create_accuracy_aware_training_loop,
    create_compressed_model,
    register_default_init_args,
)

CONFIG = {
    "input_info": {"sample_size": [1, 1, 8, 8]},
    "compression": {
        "algorithm": "magnitude_sparsity",
        "params": {"sparsity_target": 0.5, "sparsity_target_epoch": 1},
    },
    "accuracy_aware_training": {
        "mode": "adaptive_compression_level",
        "params": {
            "maximal_relative_accuracy_degradation": 2.0,
            "initial_training_phase_epochs": 2,
            "patience_epochs": 2,
        },
    },
}


def run(epochs: int, images: int | None) -> TrainingReport:
    torch.manual_seed(0)
    data, model = load_data(seed=0), DigitsCNN()
    data = replace(data, train_images=data.train_images[:images], train_labels=data.train_labels[:images])
    train(model, data, min(epochs, 5))
    section: Any = CONFIG["accuracy_aware_training"]
    section = {**section, "params": {**section["params"], "maximal_total_epochs": epochs}}
    config = register_default_init_args(
        {**CONFIG, "accuracy_aware_training": section},
        batches(data, 0),
        val_loader=data,
        model_eval_fn=accuracy,
    )
    controller, model = create_compressed_model(model, config)
    print(controller.plan(epochs).to_str())

    def train_epoch(controller: Any, model: nn.Module, epoch: int, optimizer: Any, lr_scheduler: Any) -> None:
        model.train()
        controller.scheduler.epoch_step()
        for inputs, labels in batches(data, epoch):
            controller.scheduler.step()
            loss = F.cross_entropy(model(inputs), labels) + controller.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    loop = create_accuracy_aware_training_loop(config, controller, show_progress=False)
    loop.run(
        model,
        train_epoch,
        lambda model, epoch: accuracy(model, data),
        lambda: (torch.optim.Adam(model.parameters(), lr=1e-3), None),
    )
    assert loop.report is not None  # the loop has run
    print(loop.report.to_str())
    return loop.report


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--images", type=int)
    options = parser.parse_args()
    run(options.epochs, options.images)
