"""NVFP4 simulators: 4-bit floating point in blocks of 16 with e4m3 scales, an extension."""

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization import QuantizationSpec
from coreai_opt.quantization.spec import PerBlockGranularity, QuantizationComponentFactory

BLOCKS = PerBlockGranularity(axis=-1, block_size=16)
NVFP4: dict[str, Any] = {
    "dtype": torch.float4_e2m1fn_x2,
    "scale_dtype": torch.float8_e4m3fn,
    "granularity": BLOCKS,
}


def simulator(target: str = "weight", **fields: Any) -> Any:
    spec = QuantizationSpec(**NVFP4 | fields)
    return QuantizationComponentFactory.create_fake_quantizer(
        spec=spec, quantization_target=CompressionTargetTensor[target.upper()]
    )


def input_of(seed: int = 0) -> torch.Tensor:
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))


def test_names_and_dtypes_say_the_same():
    by_name = QuantizationSpec(dtype="float4_e2m1fn", scale_dtype="float8_e4m3fn", granularity=BLOCKS)
    assert by_name == QuantizationSpec(**NVFP4)
    assert QuantizationSpec.model_validate(by_name.model_dump()) == by_name


@pytest.mark.parametrize("dtype", ["int8", "int4", "float8_e4m3fn", "float8_e5m2"])
def test_other_values_have_no_e4m3_scales(dtype):
    with pytest.raises(ValidationError, match=rf"float4_e2m1fn_x2\]; got dtype=torch\.{dtype}"):
        QuantizationSpec(dtype=dtype, scale_dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("fields", [{"qscheme": "asymmetric"}, {"qformulation": "minval"}])
def test_symmetric_only(fields):
    with pytest.raises(ValidationError, match="e4m3fn; got"):
        QuantizationSpec(**NVFP4, **fields)


@pytest.mark.parametrize("calculator", ["static", "moving_average", "global_minmax", "dynamic"])
def test_training_steps(calculator):
    """Scales of blocks are e4m3 multiples of the tensor's, values e2m1 multiples of those."""
    module = simulator("activation", qparam_calculator_cls=calculator)
    for seed in range(3):
        x = input_of(seed).requires_grad_()
        y = module(x)
        y.backward(torch.ones_like(y))
        assert set(x.grad.unique().tolist()) <= {0.0, 1.0}
    if calculator == "dynamic":
        scale = module.qparams_calculator(input_of(2))[0]
    else:
        scale = module.qparams_calculator.scale
    of_blocks = scale / (scale.max() / 448)
    torch.testing.assert_close(of_blocks.to(torch.float8_e4m3fn).float(), of_blocks, rtol=1e-6, atol=0)
    halves = (2 * y.detach() / scale.repeat_interleave(16, 1)).abs()
    torch.testing.assert_close(halves.round(), halves, rtol=1e-6, atol=0)
    assert set(halves.round().unique().tolist()) <= {0, 1, 2, 3, 4, 6, 8, 12}


def test_more_exact_than_power_of_two_scales():
    x = input_of()
    its_own = simulator(scale_dtype=torch.float8_e8m0fnu)(x)
    assert (simulator()(x) - x).square().mean() < (its_own - x).square().mean()


def test_quantized_values_and_back():
    module, x = simulator(), input_of()
    y = module(x)
    parameters = module.calculate_qparams()
    q = module.quantize(x, *parameters)
    assert q.dtype == torch.float8_e4m3fn
    assert torch.equal(module.dequantize(q, *parameters), y)


def test_checkpoint_and_copy():
    module, fresh = simulator(), simulator()
    y = module(input_of())
    fresh.load_state_dict(module.state_dict())
    fresh.disable_observer()
    assert torch.equal(fresh(input_of()), y)
    assert torch.equal(copy.deepcopy(module)(input_of()), y)


def test_a_layer_learns():
    layer = nn.Linear(64, 8, bias=False)
    with torch.no_grad():
        layer.weight.copy_(input_of())
    nn.utils.parametrize.register_parametrization(layer, "weight", simulator())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    x, wanted = input_of(1), input_of(2)[:, :8]
    losses = []
    for _ in range(30):
        loss = (layer(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
