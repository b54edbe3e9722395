"""MXINT8: int8 values with power-of-two scales. The numbers are those of coreai-opt 0.4.0."""

import math
from typing import Any

import pytest
import torch

from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization import QuantizationSpec
from coreai_opt.quantization.spec import PerBlockGranularity, QuantizationComponentFactory

E8M0 = torch.float8_e8m0fnu


def simulator(target: str = "weight", **fields: Any) -> Any:
    spec = QuantizationSpec(**{"dtype": "int8", "scale_dtype": E8M0} | fields)
    return QuantizationComponentFactory.create_fake_quantizer(
        spec=spec, quantization_target=CompressionTargetTensor[target.upper()]
    )


@pytest.mark.parametrize(
    ("largest", "scale"),
    [
        (127.0, 1.0),
        (128.0, 2.0),
        (64.0, 1.0),
        (63.0, 0.5),
        (1.0, 0.015625),
        (1.99, 0.015625),
        (0.75, 0.0078125),
        (0.0, 1.1754943508222875e-38),
        (3e-39, 1.1754943508222875e-38),
        (1e-30, 1.232595164407831e-32),
        (3.4e38, 2.658455991569832e36),
        (math.inf, 5.316911983139664e36),
        (math.nan, 5.316911983139664e36),
    ],
)
def test_scales(largest, scale):
    module = simulator()
    module(torch.tensor([[largest, -largest, largest / 2, largest / 3]]))
    calculator = module.qparams_calculator
    assert calculator.scale.item() == scale
    assert calculator.zero_point.item() == 0
    torch.testing.assert_close(
        calculator.minval.reshape(()), torch.tensor(-largest), rtol=0, atol=0, equal_nan=True
    )


def test_blocks_and_gradient():
    module = simulator(granularity=PerBlockGranularity(axis=1, block_size=4))
    x = torch.tensor([[1.999, -1.999, 0.5, 0.25, 100.0, -101.0, 0.3, 7.0]], requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.tolist() == [[1.984375, -2.0, 0.5, 0.25, 100.0, -101.0, 0.0, 7.0]]
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
    assert module.qparams_calculator.scale.tolist() == [[1 / 64, 1.0]]
    q = module.quantize(x.detach(), *module.calculate_qparams())
    assert q.dtype == torch.int8
    assert q.tolist() == [[127, -128, 32, 16, 100, -101, 0, 7]]


def test_moving_average():
    module = simulator("activation", qparam_calculator_cls="moving_average")
    module(torch.tensor([[1.5, -0.3]]))
    module(torch.tensor([[3.5, -0.3]]))
    calculator = module.qparams_calculator
    assert calculator.running_max.item() == pytest.approx(1.52)
    assert calculator.scale.item() == 1 / 64
    assert calculator.minval.item() == -calculator.running_max.item()


def test_dynamic_keeps_nothing():
    module = simulator("activation", qparam_calculator_cls="dynamic")
    assert module(torch.tensor([[1.5, -0.3]])).tolist() == [[1.5, -0.296875]]
    assert not [name for name in module.state_dict() if name.startswith("qparams_calculator")]


def test_bfloat16_input():
    module = simulator()
    y = module(torch.tensor([[1.5, -0.3]], dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert module.qparams_calculator.scale.dtype == module.qparams_calculator.minval.dtype == torch.float32
    assert module.qparams_calculator.minval.item() == -1.5


@pytest.mark.parametrize(
    ("dtype", "scheme", "scale", "zero_point", "quantized"),
    [
        ("int6", "symmetric", 0.0634920671582222, 0, [-16, 5, 31]),
        ("int6", "asymmetric", 0.0476190485060215, -11, [-32, -5, 31]),
        ("int6", "symmetric_with_clipping", 0.06451612710952759, 0, [-16, 5, 31]),
        ("uint6", "symmetric", 0.0634920671582222, 32, [16, 37, 63]),
        ("uint6", "asymmetric", 0.0476190485060215, 21, [0, 27, 63]),
        ("uint6", "symmetric_with_clipping", 0.0634920671582222, 32, [16, 37, 63]),
    ],
)
def test_six_bits(dtype, scheme, scale, zero_point, quantized):
    module = simulator(dtype=dtype, scale_dtype=None, qscheme=scheme)
    x = torch.tensor([[-1.0, 0.3, 2.0]])
    module(x)
    assert module.qparams_calculator.scale.item() == scale
    assert module.qparams_calculator.zero_point.item() == zero_point
    assert module.quantize(x, *module.calculate_qparams()).tolist() == [quantized]


@pytest.mark.parametrize("bits", [3, 5, 7])
def test_odd_widths_use_their_whole_range(bits):
    module = simulator(dtype=f"int{bits}", scale_dtype=None, qscheme="asymmetric")
    x = torch.arange(-(2.0 ** (bits - 1)), 2 ** (bits - 1))[None] / 8
    module(x)
    q = module.quantize(x, *module.calculate_qparams())
    assert q.flatten().tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
