"""Post-training algorithms on a small network for handwritten digits, without training after quantization.

    python examples/post_training.py            # prints a table

Trains a network in float32, quantizes its weights to 4 and to 3 bits with a scale for each output channel,
and compares how far its scores move on images that none has seen: by rounding to nearest, and by each
algorithm.
"""

import argparse
import copy
import warnings

import torch
import torch.nn.functional as F
from digits_model import DigitsNet, load_data
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from training import BATCH, accuracy, predict, train

from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from coreai_opt.quantization.post_training import GPTQ, AdaRound
from coreai_opt.quantization.spec import PerChannelGranularity, QuantizationSpec


def configuration(dtype: str, ranges: str) -> QuantizerConfig:
    """Weights of linear layers and convolutions in ``dtype``, a scale for each output channel."""
    spec = QuantizationSpec(
        dtype=dtype, granularity=PerChannelGranularity(axis=None), range_calculator_cls=ranges
    )
    layers = ModuleQuantizerConfig(op_input_spec=None, op_output_spec=None, op_state_spec={"weight": spec})
    return QuantizerConfig(
        execution_mode="eager", global_config=layers, module_type_configs={nn.LayerNorm: None}
    )


def quantized(
    model: nn.Module, batches: list[Tensor], dtype: str, ranges: str, algorithm: object
) -> nn.Module:
    """A quantized copy of the model."""
    quantizer = Quantizer(copy.deepcopy(model), configuration(dtype, ranges))
    prepared = quantizer.prepare((batches[0],))
    if algorithm is not None:
        quantizer.calibrate(batches, algorithm)
    return prepared


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--iterations", type=int, default=1000, help="of AdaRound, for each layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of ways in the table")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    torch.manual_seed(arguments.seed)
    data = load_data(arguments.seed)
    model = DigitsNet()
    train(model, data, "float32", epochs=arguments.epochs, learning_rate=2e-3, seed=arguments.seed)
    batches = list(data.train_images[:1024].split(BATCH))
    exact = predict(model, data.test_images)

    adaround = AdaRound(iterations=arguments.iterations)
    ways = {
        "rounding to nearest": ("minmax", None),
        "the same, mse ranges": ("mse", None),
        "AWQ": ("minmax", "awq"),
        "bias correction": ("minmax", "bias_correction"),
        "AdaRound": ("minmax", adaround),
        "GPTQ": ("minmax", "gptq"),
        "GPTQ, act_order=False": ("minmax", GPTQ(act_order=False)),
        "AWQ, then GPTQ": ("minmax", ["awq", "gptq"]),
        "GPTQ, mse ranges": ("mse", "gptq"),
    }
    table = Table(title="weights of digits, without training")
    for title in ("weights", "", "error of scores", "test loss", "accuracy"):
        table.add_column(title, justify="left" if title in ("weights", "") else "right")
    labels = data.test_labels
    loss = F.cross_entropy(exact, labels).item()
    table.add_row("float32", "", "", f"{loss:.4f}", f"{accuracy(exact, labels):.1%}")
    for dtype in ("int4", "int3"):
        for name, (ranges, algorithm) in ways.items():
            if arguments.only and name not in arguments.only:
                continue
            scores = predict(quantized(model, batches, dtype, ranges, algorithm), data.test_images)
            error = ((scores - exact).square().sum() / exact.square().sum()).item()
            loss = F.cross_entropy(scores, labels).item()
            table.add_row(dtype, name, f"{error:.2e}", f"{loss:.4f}", f"{accuracy(scores, labels):.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
