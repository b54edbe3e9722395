"""Bits per layer: a search against one candidate everywhere, on handwritten digits.

A small network (two convolutions, a transformer block) is trained in float. Then each layer gets what a
search finds within the bits that each uniform compression takes, and the test accuracies are put side by
side. No retraining.
"""

import argparse
from pathlib import Path

import torch
from digits_model import Digits, DigitsNet, load_data
from torch import nn
from training import accuracy, predict, train

from coreai_opt.palettization import PalettizationSpec
from coreai_opt.quantization import QuantizationSpec
from coreai_opt.quantization.spec import PerChannelGranularity
from coreai_opt.search import Candidate, SearchResult, search

CHANNELS = PerChannelGranularity(axis=0)
CANDIDATES = [
    Candidate("int8", QuantizationSpec(dtype="int8", granularity=CHANNELS)),
    Candidate("int4", QuantizationSpec(dtype="int4", granularity=CHANNELS)),
    Candidate("int2", QuantizationSpec(dtype="int2", granularity=CHANNELS)),
    *(Candidate(f"{bits}-bit palette", PalettizationSpec(n_bits=bits)) for bits in (4, 3, 2, 1)),
]


def compare(model: nn.Module, data: Digits, budget: float, samples: torch.Tensor) -> SearchResult:
    """The best choice with so many bits per weight."""
    return search(
        model, [samples], bits_per_weight=budget, candidates=CANDIDATES, metric="kl", progress=False
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--plot", type=Path, help="write the front of the last search as SVG")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    data = load_data(seed=0)
    model = DigitsNet(width=64)
    train(model, data, "float", epochs=arguments.epochs, learning_rate=2e-3, seed=0)
    samples = data.train_images[:256]
    first = compare(model, data, 32.0, samples)
    exact = accuracy(predict(model, data.test_images), data.test_labels)
    print(f"float: accuracy {exact:.4f}")
    print(
        f"{'everywhere':16}{'bits':>8}{'KL':>12}{'accuracy':>10}   "
        f"{'searched: bits':>14}{'KL':>12}{'accuracy':>10}"
    )
    for candidate in CANDIDATES:
        bits, damage = first.uniform[candidate.name]
        uniform = search(
            model, [samples], bits_per_weight=bits + 1e-9, candidates=[candidate], metric="kl", progress=False
        )
        found = compare(model, data, bits + 1e-9, samples)
        scores = [
            accuracy(predict(each.prepare(model, (samples,)), data.test_images), data.test_labels)
            for each in (uniform, found)
        ]
        print(
            f"{candidate.name:16}{bits:8.3f}{damage:12.3g}{scores[0]:10.4f}   "
            f"{found.bits_per_weight:14.3f}{found.damage:12.3g}{scores[1]:10.4f}"
        )
    print(found.table())
    if arguments.plot:
        found.plot(arguments.plot)


if __name__ == "__main__":
    main()
