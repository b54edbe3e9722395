"""Palettized weights on handwritten digits: 4 and 2 bits, clustered alone, and trained in two ways.

    python examples/digits_palettes.py            # trains a network in float32 first, then prints a table

:func:`compare_palettes` does the same to a model that is there already.
"""

import argparse
import copy
from dataclasses import dataclass

import torch
from digits_model import Digits, DigitsNet, load_data
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.utils import parametrize
from training import accuracy, predict, train

import coreai_kernels
from coreai_opt.common import ExportBackend
from coreai_opt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)

BITS = (4, 2)
# What happens to a weight in training, as `PalettizationSpec` names it; None for no training at all.
STRATEGIES = {
    "clustered": None,
    "palettes fixed": "default",
    "weights trained": "straight_through",
    "palettes trained": "dkm",
}


@dataclass(frozen=True)
class PaletteResult:
    """Facts of one palettized model: accuracy on the test images, and bytes of its weights and palettes."""

    title: str
    n_bits: int
    accuracy: float
    packed_bytes: int
    float_bytes: int


def palettizer_for(model: nn.Module, n_bits: int, strategy: str | None) -> KMeansPalettizer:
    spec = PalettizationSpec(n_bits=n_bits, training_strategy_spec={"type": strategy or "default"})
    module_config = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    return KMeansPalettizer(model, KMeansPalettizerConfig(global_config=module_config))


@torch.no_grad()
def packed_bytes(model: nn.Module) -> int:
    """Bytes of the palettized weights as a file would hold them: packed indices, and palettes.

    The model is in evaluation mode, and not finalized yet.

    Raises:
        RuntimeError: the packed weights do not stand for exactly what the model computes with.
    """
    total = 0
    for module in model.modules():
        if parametrize.is_parametrized(module):
            simulator, weight = module.parametrizations.weight[0], module.weight
            packed = coreai_kernels.pack_bits(simulator.indices, simulator.n_bits)
            block_size = simulator.blocks(weight).block_size
            restored = coreai_kernels.lookup_packed(
                packed, simulator.centroids, weight.shape, block_size=block_size, bits=simulator.n_bits
            )
            if not torch.equal(restored, weight):
                raise RuntimeError(f"packed weights {tuple(weight.shape)} differ from the model's")
            total += packed.nbytes + simulator.centroids.nbytes
    return total


def compare_palettes(
    model: nn.Module, data: Digits, *, epochs: int, learning_rate: float, seed: int
) -> list[PaletteResult]:
    """Palettize copies of ``model`` with each number of bits in each way, and measure them."""
    results = []
    for n_bits in BITS:
        for title, strategy in STRATEGIES.items():
            copied = copy.deepcopy(model)
            palettizer = palettizer_for(copied, n_bits, strategy)
            palettizer.prepare((data.train_images[:1],))
            if strategy is not None:
                train(
                    copied,
                    data,
                    f"{n_bits} bits, {title}",
                    epochs=epochs,
                    learning_rate=learning_rate,
                    seed=seed,
                    weight_decay=0.01,
                    mode=palettizer.training_mode,
                    after_step=palettizer.step,
                )
            copied.eval()
            packed = packed_bytes(copied)
            float_bytes = sum(
                module.parametrizations.weight.original.nbytes
                for module in copied.modules()
                if parametrize.is_parametrized(module)
            )
            palettizer.finalize(backend=ExportBackend.Torch)
            results.append(
                PaletteResult(
                    title=title,
                    n_bits=n_bits,
                    accuracy=accuracy(predict(copied, data.test_images), data.test_labels),
                    packed_bytes=packed,
                    float_bytes=float_bytes,
                )
            )
    return results


def print_palettes(float_accuracy: float, results: list[PaletteResult], console: Console) -> None:
    """One row a number of bits, one column a way."""
    table = Table(
        title="Handwritten digits: palettized weights, test accuracy",
        caption=f"In float32: {float_accuracy:.2%}. Training adds epochs to the float32 training.",
    )
    table.add_column("")
    for title in STRATEGIES:
        table.add_column(title, justify="right")
    table.add_column("weights", justify="right")
    for n_bits in BITS:
        row = [result for result in results if result.n_bits == n_bits]
        size = f"{row[0].packed_bytes / 1024:.1f} KiB of {row[0].float_bytes / 1024:.1f}"
        table.add_row(f"{n_bits} bits", *(f"{result.accuracy:.2%}" for result in row), size)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--epochs", type=int, default=40, help="of training in float; half as many with palettes"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.epochs < 2:
        parser.error("--epochs must be at least 2")
    torch.manual_seed(arguments.seed)
    data = load_data(arguments.seed)
    model = DigitsNet()
    train(model, data, "float32", epochs=arguments.epochs, learning_rate=2e-3, seed=arguments.seed)
    float_accuracy = accuracy(predict(model, data.test_images), data.test_labels)
    results = compare_palettes(
        model, data, epochs=arguments.epochs // 2, learning_rate=5e-4, seed=arguments.seed
    )
    print_palettes(float_accuracy, results, Console())


if __name__ == "__main__":
    main()
