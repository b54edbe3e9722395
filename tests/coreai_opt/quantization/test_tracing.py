"""Prepared models under TorchScript's tracer and ONNX's older exporter, which builds on it."""

import io
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer
from coreai_opt.quantization.spec import PerBlockGranularity, QuantizationSpec
from coreai_opt.quantization.spec.spec import (
    default_activation_quantization_spec,
    default_weight_quantization_spec,
)

from .support import eager

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
ACTIVATIONS = {"*": default_activation_quantization_spec()}
BLOCKS = QuantizationSpec(dtype=torch.int4, granularity=PerBlockGranularity(axis=1, block_size=4))


def calibrated(weight: QuantizationSpec) -> nn.Module:
    torch.manual_seed(0)
    module = ModuleQuantizerConfig(
        op_state_spec={"weight": weight}, op_input_spec=ACTIVATIONS, op_output_spec=ACTIVATIONS
    )
    quantizer = Quantizer(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), eager(global_config=module)
    )
    model = quantizer.prepare((X,))
    with quantizer.calibration_mode():
        model(X)
    return model


@pytest.mark.parametrize("weight", [default_weight_quantization_spec(), BLOCKS], ids=["channels", "blocks"])
@pytest.mark.parametrize("training", [True, False])
def test_a_traced_model_computes_and_learns_as_the_model(weight: QuantizationSpec, training: bool) -> None:
    model = calibrated(weight).train(training)
    traced = torch.jit.trace(model, (X,), check_trace=False)
    gradients = []
    for each in (traced, model):
        each.zero_grad()
        output = each(X)
        output.sum().backward()
        gradients.append([output, *(parameter.grad.clone() for parameter in model.parameters())])
    assert gradients[0][1].any()
    for got, wanted in zip(*gradients, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("records", [True, False], ids=["gradients", "no gradients"])
@pytest.mark.parametrize("observes", [True, False])
def test_the_older_onnx_exporter_gets_operators_that_it_knows(records: bool, observes: bool) -> None:
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = calibrated(BLOCKS).eval()
    if observes:
        for module in model.modules():
            if hasattr(module, "enable_observer"):
                module.enable_observer()
    file = io.BytesIO()
    with nullcontext() if records else torch.no_grad():
        torch.onnx.export(model, (X,), file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    (output,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    assert torch.allclose(torch.from_numpy(output), model(X), atol=1e-6)
