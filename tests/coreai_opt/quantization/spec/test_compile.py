"""torch.compile without graph breaks, from the first forward on: the same results as eager mode."""

import logging

import pytest
import torch

from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity

BLOCKS = PerBlockGranularity(axis=1, block_size=4)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def assert_same_steps(eager, compiled_module, inputs, train=True):
    compiled = torch.compile(compiled_module, fullgraph=True, backend="aot_eager")
    for tensor in inputs:
        first, second = (tensor.clone().requires_grad_(train) for _ in range(2))
        y, z = eager(first), compiled(second)
        assert torch.equal(y, z)
        if train:
            grad = torch.randn_like(y)
            y.backward(grad)
            z.backward(grad)
            assert torch.equal(first.grad, second.grad)
        state, other = eager.state_dict(), compiled_module.state_dict()
        assert all(torch.equal(state[key], other[key]) for key in state)
        assert all(state[key].dtype == other[key].dtype for key in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qparam_calculator_cls": "static", "granularity": BLOCKS, "dtype": "int4"},
        {"qparam_calculator_cls": "global_minmax", "granularity": PerChannelGranularity(axis=-1)},
        {"qparam_calculator_cls": "dynamic", "qscheme": "asymmetric"},
        {"dtype": "float4_e2m1fn", "granularity": BLOCKS},
        {"float_range": [-1.0, 1.5], "qformulation": "minval"},
    ],
)
def test_training(make_activation, x, fields, dtype):
    inputs = [x.to(dtype) * scale for scale in (1, 3, 0.5)]
    assert_same_steps(make_activation(**fields), make_activation(**fields), inputs)


def test_without_gradient(make_activation, x):
    assert_same_steps(make_activation(), make_activation(), [x, 3 * x], train=False)


def test_after_eager_steps(make_activation, x):
    eager, compiled = make_activation(), make_activation()
    for module in (eager, compiled):
        module(x)
    assert_same_steps(eager, compiled, [2 * x, 3 * x])


def test_a_loaded_checkpoint(make_activation, x):
    trained, fresh = make_activation(), make_activation()
    trained(x)
    fresh.load_state_dict(trained.state_dict())
    assert_same_steps(trained, fresh, [2 * x])


def test_switches(make_activation, x):
    eager, compiled = make_activation(), make_activation()
    assert_same_steps(eager, compiled, [x])
    for module in (eager, compiled):
        module.disable_observer()
    assert_same_steps(eager, compiled, [5 * x])
    for module in (eager, compiled):
        module.disable_fake_quant()
    assert_same_steps(eager, compiled, [5 * x])


def test_observation_without_simulation(make_activation, x):
    eager, compiled = make_activation(), make_activation()
    for module in (eager, compiled):
        module.disable_fake_quant()
    assert_same_steps(eager, compiled, [x, 2 * x])


def test_blocks_that_do_not_divide(make, x, caplog):
    module = make(granularity=PerBlockGranularity(axis=1, block_size=3))
    module.tensor_fqn = "layer.weight"
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(compiled(x), x)
    assert any("'layer.weight'" in record.getMessage() for record in caplog.records)
    assert module.is_disabled()
    assert torch.equal(compiled(x), x)


def test_in_a_model(make, make_activation, x):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)
            self.weight_quantizer = make(granularity=PerChannelGranularity(axis=0), dtype="int4")
            self.input_quantizer = make_activation()

        def forward(self, tensor):
            weight = self.weight_quantizer(self.linear.weight)
            return torch.nn.functional.linear(self.input_quantizer(tensor), weight, self.linear.bias)

    eager, compiled_model = Model(), Model()
    compiled_model.load_state_dict(eager.state_dict())
    compiled = torch.compile(compiled_model, fullgraph=True, backend="aot_eager")
    for step in range(3):
        y, z = eager(x * (step + 1)), compiled(x * (step + 1))
        torch.testing.assert_close(y, z)
        y.sum().backward()
        z.sum().backward()
        torch.testing.assert_close(eager.linear.weight.grad, compiled_model.linear.weight.grad)


def test_users_methods(make, x, registration):
    from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

    @registration(FakeQuantizeImplBase, "plain")
    class Plain(FakeQuantizeImplBase):
        def quantize(self, tensor, scale, zero_point, minval, cast_to_target_dtype=True):
            return (tensor / scale).clamp(self.quant_min, self.quant_max)

        def dequantize(self, tensor, scale, zero_point, minval, output_dtype=torch.float32):
            return tensor * scale

    fields = {"fake_quantize_cls": "plain", "qparam_calculator_cls": "moving_average"}
    assert_same_steps(make(**fields), make(**fields), [x, 2 * x])
