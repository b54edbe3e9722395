"""Palettized weights and quantized activations on one model."""

import pytest
import torch
from torch import nn

from coreai_opt.common import ExportBackend
from coreai_opt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, Quantizer, QuantizerConfig

INPUTS = torch.randn(32, 12, generator=torch.Generator().manual_seed(0))
TARGET = torch.ones(32, 4)


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))


def palettize(model, strategy):
    spec = PalettizationSpec(n_bits=2, training_strategy_spec={"type": strategy})
    module_config = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    palettizer = KMeansPalettizer(model, KMeansPalettizerConfig(global_config=module_config))
    palettizer.prepare((INPUTS,))
    return palettizer


def quantize_activations(model):
    activation = QuantizationSpec(dtype="int8")
    module_config = ModuleQuantizerConfig(
        op_input_spec={"*": activation}, op_output_spec={"*": activation}, op_state_spec=None
    )
    quantizer = Quantizer(model, QuantizerConfig(global_config=module_config, execution_mode="eager"))
    quantizer.prepare((INPUTS,))
    return quantizer


def train(model, palettizer, quantizer, steps=20):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    with palettizer.training_mode(), quantizer.training_mode():
        for _ in range(steps):
            loss = (model(INPUTS) - TARGET).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            palettizer.step()
            quantizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("strategy", ["default", "straight_through", "dkm"])
@pytest.mark.parametrize("first", ["palettizer", "quantizer"])
def test_training(strategy, first):
    model = make_model()
    if first == "palettizer":
        palettizer = palettize(model, strategy)
        quantizer = quantize_activations(model)
    else:
        quantizer = quantize_activations(model)
        palettizer = palettize(model, strategy)
    losses = train(model, palettizer, quantizer)
    assert losses[-1] < 0.5 * losses[0]
    quantizer.finalize(backend=ExportBackend.Torch)
    palettizer.finalize(backend=ExportBackend.Torch)
    model.eval()
    output = model(INPUTS)
    assert all(model[index].weight.unique().numel() == 4 for index in (0, 2))
    scale = model[2].linear_quantize_output_0.calculate_qparams()[0]
    assert torch.allclose(output / scale, (output / scale).round(), atol=1e-3)


def test_both_states_in_one_checkpoint():
    models = []
    for _ in range(2):
        model = make_model()
        models.append((model, palettize(model, "straight_through"), quantize_activations(model)))
    train(*models[0])
    models[1][0].load_state_dict(models[0][0].state_dict())
    first, second = (model.eval()(INPUTS) for model, _, _ in models)
    assert torch.equal(first, second)
