"""Bad input: which error it gets, and that the model is as before."""

import pytest
import torch
from torch import Tensor, nn

from coreai_opt import ExportBackend
from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, Quantizer
from coreai_opt.quantization.config import OpQuantizerConfig
from coreai_opt.quantization.spec import PerChannelGranularity

from .support import OFF, Mlp, Outer, eager, globally, prepared, same, snapshot

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
OPEN_AXIS = QuantizationSpec(granularity=PerChannelGranularity())


class Failing(Mlp):
    """Fails in the second of the two forwards of prepare."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__["calls"] = self.calls + 1
        if self.calls == 2:
            self.__dict__.pop("calls")
            raise ArithmeticError("the second time")
        return super().forward(x)


class Clashing(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.first.linear_quantize_input = nn.Identity()


CASES = {
    "no inputs": (Mlp, eager(), (), TypeError, "missing 1 required positional argument"),
    "inputs of another shape": (Mlp, eager(), (torch.ones(3, 3),), RuntimeError, "shapes cannot be mult"),
    "a tensor for inputs": (Mlp, eager(), X, TypeError, "example_inputs must be a tuple"),
    "a dict for inputs": (Mlp, eager(), {"y": X}, TypeError, "example_inputs does not fit Mlp.forward"),
    "meta": (lambda: Mlp().to("meta"), eager(), (X,), RuntimeError, "'first.weight' is on the meta device"),
    "second forward": (Failing, eager(), (X,), ArithmeticError, "the second time"),
    "clash": (Clashing, eager(), (X,), RuntimeError, "'first' has an attribute 'linear_quantize_input'"),
    "activation without an axis": (
        Mlp,
        globally(op_input_spec={"*": OPEN_AXIS}),
        (X,),
        ValueError,
        "need an axis.*first.linear_quantize_input, second.linear_quantize_input",
    ),
    "an axis that a weight has not": (
        Mlp,
        globally(op_state_spec={"weight": QuantizationSpec(granularity=PerChannelGranularity(axis=7))}),
        (X,),
        ValueError,
        r"'first\.weight' cannot be quantized with PerChannelGranularity\(axis=7\): axis must be .* or none",
    ),
    "an axis that an activation has not": (
        Mlp,
        globally(op_input_spec={"*": QuantizationSpec(granularity=PerChannelGranularity(axis=7))}),
        (X,),
        ValueError,
        r"'first\.linear_quantize_input' cannot be quantized with PerChannelGranularity\(axis=7\)",
    ),
    "state without an axis": (
        Mlp,
        eager(
            module_type_configs={nn.Linear: ModuleQuantizerConfig(module_state_spec={"bias": OPEN_AXIS})},
        ),
        (X,),
        ValueError,
        "need an axis.*: first.bias, second.bias",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_failed_prepare_leaves_the_model_as_it_was(case) -> None:
    make, config, inputs, error, message = CASES[case]
    model = make()
    model.second.eval()
    quantizer = Quantizer(model, config)
    before = snapshot(model)
    before["state"] = {} if case == "meta" else before["state"]
    with pytest.raises(error, match=message):
        quantizer.prepare(inputs)
    after = snapshot(model)
    after["state"] = {} if case == "meta" else after["state"]
    assert same(before, after)


@pytest.mark.parametrize(
    ("where", "field"),
    [
        (None, "op_input_spec"),
        (None, "op_output_spec"),
        (None, "module_input_spec"),
        (None, "module_output_spec"),
        ("op_type_config", "op_input_spec"),
        ("op_name_config", "op_output_spec"),
    ],
)
def test_tensors_are_named_by_positions(where, field) -> None:
    named = {field: {"input": QuantizationSpec()}}
    fields = named if where is None else {where: {"linear": OpQuantizerConfig(**named)}}
    config = eager(module_name_configs={"first": ModuleQuantizerConfig(**fields)})
    message = f"{field} of module_name_configs.*named by their position.*got 'input'"
    with pytest.raises(NotImplementedError, match=message):
        Quantizer(Mlp(), config)


def test_prepare_can_be_tried_again() -> None:
    quantizer = Quantizer(Mlp(), eager())
    with pytest.raises(RuntimeError):
        quantizer.prepare((torch.ones(3, 3),))
    model = quantizer.prepare((X,))
    assert model(X).shape == (4, 4)


def test_prepared_twice() -> None:
    quantizer, model = prepared(Mlp(), X)
    before = snapshot(model)
    for again in (quantizer, Quantizer(model, eager())):
        with pytest.raises(RuntimeError, match="prepared already, by a Quantizer"):
            again.prepare((X,))
    assert same(before, snapshot(model))


def test_unprepared() -> None:
    quantizer = Quantizer(Mlp(), eager())
    with pytest.raises(RuntimeError, match="not prepared"):
        quantizer.finalize(backend=ExportBackend.Torch)
    with pytest.raises(RuntimeError, match=r"training_mode\(\)"):
        quantizer.step()
    for mode in (quantizer.calibration_mode, quantizer.training_mode):
        with pytest.raises(RuntimeError, match="not prepared"), mode():
            pass
    quantizer.prepare((X,))
    with pytest.raises(RuntimeError, match="not prepared"), quantizer.calibration_mode(Mlp()):
        pass


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "onnx"}, ValueError, "must be one of"),
        ({"backend": None}, ValueError, "must be one of"),
        ({"backend": ExportBackend.Torch, "mmap_dir": "/tmp"}, ValueError, "mmap_dir"),
    ],
)
def test_backends(arguments, error, message) -> None:
    quantizer, _ = prepared(Mlp(), X)
    with pytest.raises(error, match=message):
        quantizer.finalize(**arguments)


@pytest.mark.parametrize(
    "arguments", [(None,), (Mlp,), (Mlp(), {}), (Mlp(), ModuleQuantizerConfig()), (Mlp(), "eager")]
)
def test_constructor(arguments) -> None:
    with pytest.raises(TypeError, match=r"(model|config) must be"):
        Quantizer(*arguments)


def test_a_name_that_matches_nothing() -> None:
    quantizer = Quantizer(Outer(), eager(module_name_configs={"iner": None}))
    with pytest.warns(UserWarning, match="'iner' matches no module.*'inner'"):
        quantizer.prepare((X,))


def test_arguments_of_graph_mode_warn() -> None:
    with pytest.warns(UserWarning, match="preserved_attributes"):
        quantizer = Quantizer(Mlp(), eager(preserved_attributes=[]))
    with pytest.warns(UserWarning, match="dynamic_shapes"):
        quantizer.prepare((X,), dynamic_shapes={})
    with pytest.warns(UserWarning, match="export_with_no_grad"):
        Quantizer(Mlp(), eager()).prepare((X,), export_with_no_grad=False)


def test_a_position_that_is_no_quantizable_tensor_is_logged(caplog) -> None:
    config = globally(**OFF | {"op_input_spec": {1: QuantizationSpec(), "*": None}})

    class AddMask(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x + mask

    prepared(AddMask(), X, torch.arange(8), config=config)
    assert "op_input_spec names input 1 of 'add'" in caplog.text


@pytest.mark.parametrize("part", ["", "inner"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_that_is_compiled_already(part, in_place) -> None:
    model = Outer()
    if in_place:
        model.get_submodule(part).compile(backend="eager")
    elif part:
        model.inner = torch.compile(model.inner, backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    message = f"'{part or 'the model'}' is .*compile"
    with pytest.raises(RuntimeError, match=message):
        Quantizer(model, eager()).prepare((X,))


@pytest.mark.parametrize(
    ("layer", "config", "names"),
    [
        (nn.LSTM(8, 8), ModuleQuantizerConfig(), ["0.weight_ih_l0", "0.weight_hh_l0"]),
        (
            nn.LSTM(8, 8),
            ModuleQuantizerConfig(**OFF, module_state_spec={"weight_ih_l0": QuantizationSpec()}),
            ["0.weight_ih_l0"],
        ),
        (
            nn.TransformerEncoderLayer(8, 2, 8),
            ModuleQuantizerConfig(),
            ["0.self_attn.in_proj_weight", "0.self_attn.out_proj.weight"],
        ),
        (nn.ModuleDict({"spare": nn.Linear(8, 8)}), ModuleQuantizerConfig(), ["0.spare.weight"]),
    ],
)
def test_parameters_that_get_no_simulator_are_logged(layer, config, names, caplog) -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("0", layer)

        def forward(self, x: Tensor) -> Tensor:
            return x + x if isinstance(layer, nn.ModuleDict) else layer(x)

    prepared(First(), X, config=eager(global_config=None, module_name_configs={"0": config}))
    assert f"{len(names)} parameters have a specification and are not" in caplog.text
    assert f"quantized: {', '.join(names)}. " in caplog.text


def test_parameters_that_are_quantized_are_not_logged(caplog) -> None:
    prepared(Outer(), X)
    prepared(nn.Sequential(nn.LSTM(8, 8)), X, config=globally(**OFF))
    assert "not quantized" not in caplog.text
