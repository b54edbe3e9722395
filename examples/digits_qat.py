"""Quantization, pruning and palettization of a small network on handwritten digits.

    python examples/digits_qat.py            # prints tables, writes demo/report.png

The steps, one function each in :func:`main`:

1. train a network in float32;
2. quantize its weights (int4 in blocks) and the inputs of its layers (int8): rounding alone;
3. train on with the simulators in place, once on the fused kernels and once on plain torch. Both runs must
   give the same losses and the same model, bit for bit, or the script fails. Then once more in graph mode,
   where a graph of the network is trained;
4. prune the float network while it trains on: three quarters of each weight, and two of every four elements;
5. replace its weights by palettes of 16 and of 4 values, alone and with training;
6. pack the weights as a file would hold them, and time single steps.

How a model is quantized is in ``quantized_model.py``, how it is pruned in ``pruned_model.py``, how its
weights become palettes in ``digits_palettes.py``; network and data are in ``digits_model.py``.
"""

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from digits_model import Digits, DigitsNet, load_data
from digits_palettes import compare_palettes, print_palettes
from measure import median_seconds, peak_bytes
from pruned_model import PATTERNS, Pruning, sparse_size, zeros
from quantized_model import Quantization, Size, float_size, packed_size
from report import TITLES, Report, Result, print_table, write_plots
from rich.console import Console
from torch import nn
from training import BATCH, History, accuracy, predict, train, training_step

import coreai_kernels

# Of `coreai_kernels.use_backend`: "auto" takes the fused kernels of the device at hand.
BACKENDS = {"fused": "auto", "reference": "reference"}


def require_identical(runs: dict[str, History], models: dict[str, nn.Module]) -> None:
    """Exit with a message unless both runs gave the same losses and the same model, bit for bit."""
    fused, reference = runs["fused"].losses, runs["reference"].losses
    for step, (a, b) in enumerate(zip(fused, reference, strict=True)):
        if a != b:
            sys.exit(f"the backends differ: step {step} has loss {a!r} fused and {b!r} on reference")
    other = models["reference"].state_dict()
    for name, value in models["fused"].state_dict().items():
        if not torch.equal(value, other[name]):
            sys.exit(f"the backends differ: after training, {name} is not the same")


def size_of(name: str, model: nn.Module) -> Size:
    """Bytes of a model as a file would hold it."""
    if name == "float32":
        return float_size(model)
    return sparse_size(model) if name in PATTERNS else packed_size(model)


def step_on(backend: str, model: nn.Module, data: Digits) -> Callable[[], object]:
    """A function that does one training step of a copy of ``model``."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters())
    images, labels = data.train_images[:BATCH], data.train_labels[:BATCH]

    def step() -> None:
        with coreai_kernels.use_backend(backend):
            training_step(model, optimizer, images, labels)

    return step


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the results")
    parser.add_argument("--epochs", type=int, help="of training in float; half as many with simulators")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, as a test")
    arguments = parser.parse_args()
    arguments.epochs = arguments.epochs or (3 if arguments.quick else 40)
    if arguments.epochs < 2:
        parser.error("--epochs must be at least 2")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    # torch 2.13 gives one where it copies a graph.
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    torch.use_deterministic_algorithms(True)
    data = load_data(arguments.seed)

    model = DigitsNet()
    epochs, seed = arguments.epochs, arguments.seed
    runs = {"float32": train(model, data, "float32", epochs=epochs, learning_rate=2e-3, seed=seed)}

    rounded = Quantization.of(model, data.train_images, BATCH)

    quantized = {}
    for name, backend in BACKENDS.items():
        quantized[name] = rounded.copied()
        with coreai_kernels.use_backend(backend):
            runs[name] = train(
                quantized[name].model,
                data,
                f"QAT {name}",
                epochs=epochs // 2,
                learning_rate=5e-4,
                seed=seed,
                mode=quantized[name].training,
            )
    trained = {name: each.model for name, each in quantized.items()}
    require_identical(runs, trained)

    in_graph = Quantization.of(model, data.train_images, BATCH, mode="graph")
    runs["graph"] = train(
        in_graph.model,
        data,
        "QAT graph",
        epochs=epochs // 2,
        learning_rate=5e-4,
        seed=seed,
        mode=in_graph.training,
    )

    prunings = {}
    steps_to_come = epochs // 2 * (len(data.train_labels) // BATCH)
    for name, spec in PATTERNS.items():
        prunings[name] = Pruning.of(model, spec, data.train_images[:1], steps_to_come)
        runs[name] = train(
            prunings[name].model,
            data,
            TITLES[name].replace("\n", " "),
            epochs=epochs // 2,
            learning_rate=5e-4,
            seed=seed,
            after_step=prunings[name].step,
        )
    observing = {name: each.observing() for name, each in (*quantized.items(), ("graph", in_graph))}
    in_training = {"float32": model, **observing, **{name: each.model for name, each in prunings.items()}}
    pruned = {name: each.finished() for name, each in prunings.items()}

    palettes = compare_palettes(model, data, epochs=max(1, epochs // 8), learning_rate=5e-4, seed=seed)

    models = {"float32": model, "rounded": rounded.model, **trained, "graph": in_graph.model, **pruned}
    steps = {name: step_on(BACKENDS.get(name, "auto"), in_training[name], data) for name in runs}
    seconds = median_seconds(steps, rounds=2 if arguments.quick else 25)
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    results = {}
    for name, each in models.items():
        scores = predict(each, data.test_images)
        results[name] = Result(
            accuracy=accuracy(scores, data.test_labels),
            loss=F.cross_entropy(scores, data.test_labels).item(),
            size=size_of(name, each),
            zeros=zeros(each) if name in pruned else None,
            seconds=seconds.get(name),
            peak=peaks.get(name),
            predictions=scores.argmax(1),
        )

    console = Console()
    report = Report(
        results,
        {name: (run.losses, run.accuracies) for name, run in runs.items()},
        {name: each.sparsities for name, each in prunings.items()},
    )
    print_table(report, console)
    same = f"The {len(runs['fused'].losses)} QAT losses and the final models of both backends are identical."
    console.print(
        same, "Packed weights, unpacked, equal the simulated and the pruned ones bit for bit.", sep="\n"
    )
    print_palettes(results["float32"].accuracy, palettes, console)
    for name, run in runs.items():
        console.print(f"last training loss, {name}: {run.losses[-1]!r}", highlight=False)
    write_plots(report, data, arguments.out / "report.png")
    (arguments.out / "losses.json").write_text(json.dumps({name: run.losses for name, run in runs.items()}))
    console.print(f"Wrote {arguments.out / 'report.png'} and losses.json.", soft_wrap=True)


if __name__ == "__main__":
    main()
