"""Rules of placement that a user relies on. That all of them are Apple's is tested in tests/parity."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, QuantizerConfig
from coreai_opt.quantization.config.quantization_config import KVCacheQuantConfig, OpQuantizerConfig
from coreai_opt.quantization.spec import PerChannelGranularity
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase
from coreai_opt.quantization.spec.qparams_calculator import QParamsCalculatorBase, StaticQParamsCalculator

from .support import Function, asymmetric, mlp, only, prepared, simulators, x


def reads(model: Any) -> dict[str, list[str]]:
    """By the node that each quantizer reads, the nodes that read it."""
    return {
        node.args[0].name: [user.name for user in node.users]
        for node in model.graph.nodes
        if node.op == "call_module"
    }


def of(model: Any, name: str) -> FakeQuantizeImplBase:
    """The quantizer that reads the node of that name."""
    (node,) = [each for each in model.graph.nodes if each.op == "call_module" and each.args[0].name == name]
    return simulators(model)[node.target]


def test_what_one_operation_gives_and_the_next_takes_has_one_quantizer() -> None:
    _, found = prepared(mlp(), x(2, 4))
    assert reads(found) == {
        "_0_weight": ["linear"],
        "_2_weight": ["linear_1"],
        "input_1": ["linear"],
        "relu": ["linear_1"],
        "linear_1": ["output"],
    }


def test_the_more_specific_configuration_holds_for_what_neighbours_share() -> None:
    entry = ModuleQuantizerConfig(op_input_spec={"*": asymmetric("uint8")})
    _, found = prepared(mlp(), x(2, 4), config=QuantizerConfig(module_name_configs={"2": entry}))
    assert of(found, "relu").dtype == torch.uint8
    assert of(found, "input_1").dtype == torch.int8


def test_values_that_are_only_moved_keep_their_quantizer() -> None:
    model = Function(
        lambda m, t: m.b(torch.relu(m.a(t)).transpose(0, 1)), a=nn.Linear(4, 3), b=nn.Linear(2, 3)
    )
    _, found = prepared(model, x(2, 4))
    assert of(found, "relu") is of(found, "transpose")


def test_a_fixed_range_holds_towards_the_output() -> None:
    _, found = prepared(nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), x(2, 4))
    calculator = of(found, "sigmoid").qparams_calculator
    assert calculator.float_range == [0.0, 1.0]
    torch.testing.assert_close(calculator.scale.flatten(), torch.tensor([1 / 255]))


def test_a_shared_quantizer_that_cannot_keep_its_axis_quantizes_per_tensor(
    caplog: pytest.LogCaptureFixture,
) -> None:
    spec = QuantizationSpec(granularity=PerChannelGranularity(axis=2))
    entry = ModuleQuantizerConfig(op_input_spec={"*": spec}, op_output_spec={"*": spec})
    _, found = prepared(nn.MaxPool2d(2), x(1, 2, 4, 4), config=QuantizerConfig(global_config=entry))
    assert of(found, "max_pool2d").qparams_calculator.scale.numel() == 1
    assert "max_pool2d" in caplog.text


def test_buffers_that_an_operation_writes_into_are_not_quantized() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.zeros(2, 4))

        def forward(self, t: Tensor) -> Tensor:
            self.weight.add_(t)
            return t * 2

    _, found = prepared(Counter(), x(2, 4))
    found(x(2, 4))
    assert "weight" not in reads(found)


def test_tensors_given_by_keyword_are_quantized() -> None:
    model = Function(lambda m, a, b: torch.add(a, other=b))
    _, found = prepared(model, x(2, 4), x(2, 4))
    assert len(simulators(found)) == 3


@torch.library.custom_op("graph_tests::update", mutates_args=())
def update(cache: Tensor, new: Tensor) -> Tensor:
    result = cache.clone()
    result[:, 0] = new
    return result


@update.register_fake
def _(cache: Tensor, new: Tensor) -> Tensor:
    return torch.empty_like(cache)


def caches(**fields: Any) -> QuantizerConfig:
    specs = OpQuantizerConfig(op_input_spec={1: asymmetric("uint8")}, op_output_spec=None, op_state_spec=None)
    return QuantizerConfig(
        kv_cache_quant_configs={"update": KVCacheQuantConfig(op_quantizer_config=specs)}, **fields
    )


def cached() -> nn.Module:
    return Function(lambda m, t, c: torch.ops.graph_tests.update(c, m.k(t)) * 2.0, k=nn.Linear(4, 4))


def test_a_cache_is_quantized_where_it_is_written() -> None:
    _, found = prepared(cached(), x(2, 4), x(2, 3, 4), config=caches(global_config=None))
    assert reads(found) == {"linear": ["update"]}
    assert of(found, "linear").dtype == torch.uint8


def test_a_cache_and_activations() -> None:
    _, found = prepared(cached(), x(2, 4), x(2, 3, 4), config=caches())
    assert found(x(2, 4), x(2, 3, 4)).shape == (2, 3, 4)
    assert reads(found)["update"] == ["mul"]
    (before,) = [name for name, readers in reads(found).items() if readers == ["update"]]
    assert of(found, before).dtype == torch.uint8
    assert simulators(found)[before].dtype == torch.int8


def test_a_declined_boundary_leaves_its_neighbours_quantized() -> None:
    entry = ModuleQuantizerConfig(module_output_spec={0: None})
    _, found = prepared(mlp(), x(2, 4), config=QuantizerConfig(module_name_configs={"1": entry}))
    assert reads(found)["relu"] == ["linear_1"]


@pytest.fixture
def own_classes() -> Iterator[None]:
    @FakeQuantizeImplBase.register("halved")
    class Halved(FakeQuantizeImplBase.get_class("default")):  # type: ignore[misc]
        def _fused_fake_quant_dequant(self, *args: Any, **kwargs: Any) -> Tensor:
            return super()._fused_fake_quant_dequant(*args, **kwargs) / 2

    @QParamsCalculatorBase.register("widened")
    class Widened(StaticQParamsCalculator):
        def compute_qparams(self, tensor: Tensor, min_val: Tensor, max_val: Tensor) -> Any:
            return super().compute_qparams(tensor, 2 * min_val, 2 * max_val)

    yield
    del FakeQuantizeImplBase.REGISTRY["halved"], QParamsCalculatorBase.REGISTRY["widened"]


def test_classes_of_ones_own_simulate(own_classes: None) -> None:
    spec = QuantizationSpec(fake_quantize_cls="halved", qparam_calculator_cls="widened")
    config = QuantizerConfig(global_config=only(op_state_spec={"weight": spec}))
    model = nn.Linear(4, 4, bias=False)
    _, found = prepared(model, x(2, 4), config=config)
    torch.testing.assert_close(found(x(2, 4)), model(x(2, 4)) / 2, atol=0.05, rtol=0.05)
    (quantizer,) = simulators(found).values()
    largest = model.weight.detach().abs().max()
    torch.testing.assert_close(quantizer.qparams_calculator.scale.flatten()[0], 2 * largest / 127.5)
