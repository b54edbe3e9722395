"""Which simulators a configuration puts where."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreai_opt.pruning import MagnitudePruner, MagnitudePrunerConfig
from coreai_opt.quantization import ModuleQuantizerConfig, QuantizerConfig
from coreai_opt.quantization.config import OpQuantizerConfig
from coreai_opt.quantization.spec import (
    PerBlockGranularity,
    PerChannelGranularity,
    QuantizationSpec,
)
from coreai_opt.quantization.spec.spec import (
    default_activation_quantization_spec as activation,
)
from coreai_opt.quantization.spec.spec import (
    default_weight_quantization_spec as weight,
)

from .support import OFF, WEIGHTS_ONLY, Mlp, Outer, Residual, eager, globally, prepared, simulators, slots

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def channel(axis: int | None) -> QuantizationSpec:
    return QuantizationSpec(
        granularity=PerChannelGranularity(axis=axis), qparam_calculator_cls="moving_average"
    )


def test_modules_of_one_operation() -> None:
    _, model = prepared(Mlp(), X)
    assert slots(model) == {
        f"{name}.{each}"
        for name in ("first", "second")
        for each in ("linear_quantize_input", "linear_quantize_output_0", "parametrizations.weight.0")
    }
    assert model.state_dict()["first.parametrizations.weight.original"].shape == (16, 8)


def test_operations_of_a_forward_are_numbered_in_their_order() -> None:
    _, model = prepared(Residual(), X)
    own = {slot for slot in slots(model) if not slot.startswith("linear.")}
    assert own == {
        "add_quantize_input",
        "add_quantize_other",
        "add_quantize_output_0",
        "mul_quantize_input",
        "mul_quantize_output_0",
        "add_1_quantize_input",
        "add_1_quantize_other",
        "add_1_quantize_output_0",
    }


def test_default_configuration_names_match_the_operations_of_torch() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(x, self.w) @ self.w.t()
            x = F.max_pool2d(x[None, None], 2)
            x -= F.softmax(F.relu(x), -1)
            return F.adaptive_avg_pool2d(x.mul_(3), 1) / 2

    _, model = prepared(Functional(), X)
    operations = {slot.split("_quantize_")[0] for slot in slots(model)}
    assert operations == {"linear", "matmul", "max_pool2d", "sub_", "mul_", "adaptive_avg_pool2d"}


@pytest.mark.parametrize("operand", [torch.tensor(2.0), torch.ones(1), torch.arange(8), 3])
def test_scalars_and_integers_are_not_simulated(operand: Tensor | int) -> None:
    class Add(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + operand

    assert slots(prepared(Add(), X)[1]) == {"add_quantize_input", "add_quantize_output_0"}


@pytest.mark.parametrize(
    ("module", "shape", "axes"),
    [
        (nn.Linear(64, 64), (2, 64), (0, 1)),
        (nn.Conv1d(64, 64, 3), (2, 64, 8), (0, 1)),
        (nn.Conv2d(64, 64, 3), (2, 64, 8, 8), (0, 1)),
        (nn.Conv3d(64, 64, 3), (2, 64, 8, 8, 8), (0, 1)),
        (nn.ConvTranspose1d(64, 64, 3), (2, 64, 8), (1, 0)),
        (nn.ConvTranspose2d(64, 64, 3), (2, 64, 8, 8), (1, 0)),
        (nn.ConvTranspose3d(64, 64, 3), (2, 64, 8, 8, 8), (1, 0)),
    ],
)
def test_default_axes(module: nn.Module, shape: tuple[int, ...], axes: tuple[int, int]) -> None:
    for config, axis in (
        (QuantizerConfig.presets.w4(execution_mode="eager"), axes[0]),
        (QuantizerConfig.presets.w4_per_block(execution_mode="eager"), axes[1]),
    ):
        model = nn.Sequential(type(module)(64, 64, *([] if len(shape) == 2 else [3])))
        _, model = prepared(model, torch.randn(shape), config=config)
        assert simulators(model)["0.parametrizations.weight.0"].granularity.axis == axis


def test_a_block_that_does_not_divide_leaves_no_simulator() -> None:
    blocks = QuantizationSpec(granularity=PerBlockGranularity(axis=1, block_size=3))
    _, model = prepared(Mlp(), X, config=globally(op_input_spec={"*": blocks}, op_output_spec=None))
    assert slots(model) == {"first.parametrizations.weight.0", "second.parametrizations.weight.0"}
    _, model = prepared(Mlp(), X, config=globally(**WEIGHTS_ONLY | {"op_state_spec": {"weight": blocks}}))
    assert slots(model) == set()
    assert type(model.first) is nn.Linear
    assert "first.weight" in model.state_dict()


def test_specifications_by_position() -> None:
    config = globally(op_input_spec={1: activation()}, op_output_spec={0: None, "*": activation()})
    _, model = prepared(Residual(), X, config=config)
    assert slots(model) == {
        "add_quantize_other",
        "add_1_quantize_other",
        "linear.parametrizations.weight.0",
    }


def test_states_by_name() -> None:
    config = globally(**WEIGHTS_ONLY, op_state_spec={"*": weight(), "weight": None})
    _, model = prepared(nn.Sequential(nn.Linear(8, 8)), X, config=config)
    assert slots(model) == {"0.parametrizations.bias.0"}


def test_buffers_are_states() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    config = globally(**WEIGHTS_ONLY, op_state_spec={"scale": weight()})
    assert slots(prepared(Scaled(), X, config=config)[1]) == {"parametrizations.scale.0"}


def test_types_and_names_of_operations() -> None:
    off = OpQuantizerConfig(**OFF)
    config = globally(
        op_type_config={"add": off, "linear": off},
        op_name_config={"inner.add_1": OpQuantizerConfig(op_output_spec=None), "sub": None},
    )
    _, model = prepared(Outer(), X, config=config)
    assert slots(model) == {
        "inner.mul_quantize_input",
        "inner.mul_quantize_output_0",
        "inner.add_1_quantize_input",
        "inner.add_1_quantize_other",
    }


def test_a_module_covers_those_inside() -> None:
    _, model = prepared(Outer(), X, config=eager(module_name_configs={"inner": None}))
    assert not any(slot.startswith("inner") for slot in slots(model))
    types = {Residual: None, nn.Linear: ModuleQuantizerConfig(**WEIGHTS_ONLY)}
    _, model = prepared(Outer(), X, config=eager(global_config=None, module_type_configs=types))
    assert slots(model) == {"inner.linear.parametrizations.weight.0", "last.parametrizations.weight.0"}


def test_boundaries_of_a_module() -> None:
    boundary = ModuleQuantizerConfig(
        **OFF, module_input_spec={0: channel(0)}, module_output_spec={0: channel(1)}
    )
    config = eager(global_config=None, module_name_configs={"inner": boundary})
    _, model = prepared(Outer(), X, config=config)
    axes = {place: each.granularity.axis for place, each in simulators(model).items()}
    # The input of the module is that of the model, too, which an operation of the model consumes.
    assert axes == {
        "inner.linear.linear_quantize_input": 0,
        "inner.add_quantize_input": 0,
        "sub_quantize_other": 0,
        "inner.add_1_quantize_output_0": 1,
    }


def test_modules_that_disagree_about_an_input_are_named_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def receiving(axis: int) -> ModuleQuantizerConfig:
        return ModuleQuantizerConfig(**OFF, module_input_spec={0: channel(axis)})

    names = {"inner": receiving(0), "inner.linear": receiving(1)}
    _, model = prepared(Outer(), X, config=eager(global_config=None, module_name_configs=names))
    assert {each.granularity.axis for each in simulators(model).values()} == {1}
    lines = [record.getMessage() for record in caplog.records if "module_input_spec" in record.getMessage()]
    assert len(lines) == 1
    assert "'inner.linear' holds, not that of 'inner'" in lines[0]
    caplog.clear()
    names = {"inner": receiving(0), "inner.linear": receiving(0)}
    prepared(Outer(), X, config=eager(global_config=None, module_name_configs=names))
    assert "module_input_spec" not in caplog.text


def test_boundaries_of_a_module_without_operations_of_ours() -> None:
    boundary = ModuleQuantizerConfig(
        **OFF, module_input_spec={"*": activation()}, module_output_spec={"*": activation()}
    )
    config = eager(global_config=None, module_type_configs={nn.ReLU: boundary})
    _, model = prepared(Outer(), X, config=config)
    assert slots(model) == {"act.relu_quantize_input", "act.relu_quantize_output_0"}
    reference = Outer()
    reference.load_state_dict(model.state_dict(), strict=False)
    assert not torch.equal(model(X), reference(X))


def test_state_of_a_module() -> None:
    boundary = ModuleQuantizerConfig(**OFF, module_state_spec={"*": weight(), "bias": None})
    config = eager(global_config=None, module_type_configs={nn.LayerNorm: boundary})
    _, model = prepared(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), X, config=config)
    assert slots(model) == {"0.parametrizations.weight.0"}


def test_one_parameter_in_two_modules_has_one_simulator() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 8)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, i: Tensor) -> Tensor:
            return self.head(self.embedding(i))

    _, model = prepared(Tied(), torch.arange(4))
    found = simulators(model)
    assert found["embedding.parametrizations.weight.0"] is found["head.parametrizations.weight.0"]
    assert model.head.parametrizations.weight.original is model.embedding.parametrizations.weight.original
    assert len(list(model.parameters())) == 1


class SharedLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def of_state(dtype: str | None) -> ModuleQuantizerConfig:
    spec = None if dtype is None else QuantizationSpec(dtype=dtype)
    return ModuleQuantizerConfig(**OFF, module_state_spec={"weight": spec})


@pytest.mark.parametrize(
    ("names", "types", "dtype"),
    [
        ({"a": "int4"}, {nn.Linear: "int8"}, torch.int4),
        ({"b": "int4"}, {nn.Linear: "int8"}, torch.int4),
        ({"a": "int4", "b": "int8"}, {}, torch.int8),
        ({"b": "int8", "a": "int4"}, {}, torch.int4),
        ({"a": None}, {nn.Linear: "int8"}, None),
        ({"b": None}, {nn.Linear: "int8"}, None),
    ],
)
def test_one_parameter_in_two_modules_with_an_entry_each(names, types, dtype) -> None:
    config = eager(
        global_config=None,
        module_name_configs={name: of_state(each) for name, each in names.items()},
        module_type_configs={kind: of_state(each) for kind, each in types.items()},
    )
    _, model = prepared(SharedLinears(), X, config=config)
    found = {each.dtype for each in simulators(model).values()}
    assert found == (set() if dtype is None else {dtype})


@pytest.mark.parametrize("name", ["own", "mine", "*"])
def test_one_parameter_with_two_names_is_found_by_each(name) -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.mine)

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Parameter(torch.randn(8, 8))
            self.inner = Inner()
            self.inner.mine = self.own

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    config = globally(**WEIGHTS_ONLY, op_state_spec={name: weight()})
    _, model = prepared(Root(), X, config=config)
    assert slots(model) == {"parametrizations.own.0", "inner.parametrizations.mine.0"}


def test_types_match_modules_that_are_pruned_already() -> None:
    model = MagnitudePruner(Mlp(), MagnitudePrunerConfig()).prepare((X,))
    config = eager(global_config=None, module_type_configs={nn.Linear: ModuleQuantizerConfig()})
    _, model = prepared(model, X, config=config)
    assert slots(model) == {
        f"{name}.{each}"
        for name in ("first", "second")
        for each in ("linear_quantize_input", "linear_quantize_output_0", "parametrizations.weight.1")
    }


def test_a_module_in_use_twice_has_one_set() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x))

    _, model = prepared(Twice(), X)
    assert len(slots(model)) == 3
    assert model(X).shape == X.shape


def test_modules_that_are_not_called_have_none() -> None:
    model = Mlp()
    model.spare = nn.Linear(8, 8)
    _, model = prepared(model, X)
    assert not any(slot.startswith("spare") for slot in slots(model))


@pytest.mark.parametrize("made", [lambda ids: ids / 3, lambda ids: ids.float()], ids=["div", "float"])
def test_floats_made_of_integers_are_simulated_where_a_module_returns_them(made: Any) -> None:
    class Made(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return made(ids)  # type: ignore[no-any-return]

    ids = torch.arange(64).reshape(8, 8)
    entry = ModuleQuantizerConfig(**OFF, module_output_spec={0: activation()})
    _, model = prepared(nn.Sequential(Made()), ids, config=eager(module_name_configs={"0": entry}))
    assert not torch.equal(model(ids), made(ids))
