import warnings

import pytest
import torch
from torch import Tensor, nn

from coreai_opt.inspection import ModelInspector
from coreai_opt.palettization import KMeansPalettizer
from coreai_opt.pruning import MagnitudePruner
from coreai_opt.quantization import Quantizer, QuantizerConfig
from coreai_opt.quantization.config import InvalidExecutionModeError

X = (torch.ones(1, 10),)
TREE = """\
(torch.nn.modules.container.Sequential)
    module inputs:  {0: [FIRST[0]]}
    module outputs: {0: SECOND[0]}
├── ■ 0 (torch.nn.modules.linear.Linear)
│       module inputs:  {0: [FIRST[0]]}
│       module outputs: {0: FIRST[0]}
│   └── ◆ FIRST [linear]
│         op inputs:  {0: SOURCE}
│         op states:  weight, bias
│         op outputs: {0: [ACT]}
├── ■ 1 (torch.nn.modules.activation.ReLU)
│       module inputs:  {0: [ACT[0]]}
│       module outputs: {0: ACT[0]}
└── ■ 2 (torch.nn.modules.linear.Linear)
        module inputs:  {0: [SECOND[0]]}
        module outputs: {0: SECOND[0]}
    └── ◆ SECOND [linear]
          op inputs:  {0: ACT[0]}
          op states:  weight, bias
          op outputs: {0: [SINK]}"""
PLACEHOLDERS = ("FIRST", "SECOND", "ACT", "SOURCE", "SINK")
NAMES = {
    "graph": ("linear", "linear_1", "relu", "input_1[0]", "output"),
    "eager": ("0.linear", "2.linear", "1.relu", "input_0", "output_0"),
}


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_the_tree_as_text(mode: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = ModelInspector(perceptron(), X, mode, Quantizer).format_summary(colorize=False)
    assert text.startswith("Legend:\n  ■ module_name (module_type)  ◆ op_name [op_type]\n")
    expected = TREE
    for placeholder, name in zip(PLACEHOLDERS, NAMES[mode], strict=True):
        expected = expected.replace(placeholder, name)
    start = text.index("\n(") + 1
    assert [line.rstrip() for line in text[start:].splitlines()] == expected.splitlines()


def test_colours_are_written_where_they_are_asked_for():
    inspector = ModelInspector(perceptron(), X, "eager")
    assert "\x1b[" in inspector.format_summary(colorize=True)
    assert "\x1b[" not in inspector.format_summary(colorize=False)
    assert "\x1b[" not in inspector.format_summary()


def test_a_model_without_operations():
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    for mode in ("eager", "graph"):
        inspector = ModelInspector(Nothing(), (torch.ones(1),), mode, Quantizer)
        assert inspector.format_summary(colorize=False) == "(no compressible operations found)"
        assert inspector.summary.model.all_ops() == []


@pytest.mark.parametrize(
    ("mode", "first", "second"), [("graph", "linear", "linear_1"), ("eager", "0.linear", "2.linear")]
)
def test_lookups(mode: str, first: str, second: str):
    inspector = ModelInspector(perceptron(), X, mode, Quantizer)

    def names(ops: tuple) -> list[str]:
        return [op.op_name for op in ops]

    assert names(inspector.get_matched_ops_for_op_type("linear")) == [first, second]
    assert names(inspector.get_matched_ops_for_op_type("line")) == []
    assert names(inspector.get_matched_ops_for_op_name(second)) == [second]
    assert names(inspector.get_matched_ops_for_op_name(".*linear.*")) == [first, second]
    assert names(inspector.get_matched_ops_for_module_name("[02]")) == [first, second]
    assert names(inspector.get_matched_ops_for_module_name("")) == [first, second]
    assert names(inspector.get_matched_ops_for_module_name("2")) == [second]
    assert names(inspector.get_matched_ops_for_module_type(nn.Linear)) == [first, second]
    assert names(inspector.get_matched_ops_for_module_type("torch.nn.Linear")) == []
    with pytest.raises(ValueError, match=r"pattern must be a regular expression; '\('"):
        inspector.get_matched_ops_for_op_name("(")
    with pytest.raises(ValueError, match=r"module_name must be a regular expression; '\['"):
        inspector.get_matched_ops_for_module_name("[")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("x", X, "eager"), TypeError, "model must be an nn.Module or a GraphModule; got str"),
        ((nn.ReLU(), X, "foo"), InvalidExecutionModeError, "got 'foo'"),
        ((nn.ReLU(), None, "graph"), ValueError, "example_inputs must be"),
        ((nn.ReLU(), None, "eager"), ValueError, "example_inputs must be"),
        ((nn.ReLU(), torch.ones(1), "eager"), TypeError, "example_inputs must be a tuple"),
        ((nn.ReLU(), X, "graph", KMeansPalettizer), ValueError, "got KMeansPalettizer"),
        ((nn.ReLU(), X, "eager", MagnitudePruner), ValueError, "got MagnitudePruner"),
        ((nn.ReLU(), X, "eager", "Quantizer"), ValueError, "got 'Quantizer'"),
        ((nn.Linear(3, 3), X, "graph"), RuntimeError, "cannot export Linear"),
    ],
)
def test_bad_arguments(arguments: tuple, error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        ModelInspector(*arguments)


def test_graph_modules():
    program = torch.export.export(perceptron(), X)
    inspector = ModelInspector(program.module(check_guards=False), None, "graph")
    assert [op.op_name for op in inspector.summary.model.all_ops()] == ["linear", "relu", "linear_1"]
    with pytest.raises(TypeError, match="got a GraphModule"):
        ModelInspector(program.module(), X, "eager")
    # A graph of torch.fx names the modules, but not the root.
    traced = ModelInspector(torch.fx.symbolic_trace(perceptron()), None, "graph").summary.model
    assert traced.module_type.startswith("torch.fx.graph_module.GraphModule")
    assert list(traced.child_modules) == ["0", "1", "2"]


def test_arguments_of_the_export_do_nothing_in_eager_mode():
    with pytest.warns(UserWarning, match="has no effect in eager mode") as caught:
        ModelInspector(perceptron(), X, "eager", dynamic_shapes={}, export_with_no_grad=False)
    assert [str(each.message).split()[0] for each in caught] == ["dynamic_shapes", "export_with_no_grad"]


def test_dynamic_shapes_reach_the_export():
    batch = torch.export.Dim("batch", min=2)
    model = ModelInspector(perceptron(), (torch.ones(4, 10),), "graph", dynamic_shapes=({0: batch},))
    assert len(model.get_matched_ops_for_op_type("linear")) == 2


class Writes(nn.Module):
    """Writes into tensors: by index, through a view, and as a keyword."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 1.0
        y[0] = 2.0
        z = torch.relu(y)
        torch.add(z, z, out=z)
        return z * 2, torch.cos(z)


def test_what_reads_a_tensor_that_was_written_to_reads_from_the_last_write():
    ops = {
        op.op_name: op
        for op in ModelInspector(Writes(), (torch.ones(2, 2),), "eager").summary.model.all_ops()
    }
    assert [edge.op_name for edge in ops["relu"].inputs] == ["__setitem__"]
    assert [edge.op_name for edge in ops["cos"].inputs] == ["add"]
    assert ops["mul"].outputs == {0: (ops["__setitem__"],)}


class Passes(nn.Module):
    """One Identity on two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.same(torch.sin(x)), self.same(torch.cos(x)) * 2


def test_a_tensor_that_passes_through_a_module_called_twice_keeps_its_producer():
    inspector = ModelInspector(Passes(), (torch.ones(2),), "eager")
    (mul,) = inspector.get_matched_ops_for_op_name("mul")
    assert [edge.op_name for edge in mul.inputs] == ["cos"]


def test_a_prepared_model_has_the_operations_of_the_float_model():
    torch.manual_seed(0)
    model = perceptron().eval()
    before = ModelInspector(model, X, "eager", Quantizer).format_summary(colorize=False)
    prepared = Quantizer(model, QuantizerConfig(execution_mode="eager")).prepare(X)
    assert ModelInspector(prepared, X, "eager", Quantizer).format_summary(colorize=False) == before
    KMeansPalettizer(palettized := perceptron().eval()).prepare(X)
    assert ModelInspector(palettized, X, "eager", Quantizer).format_summary(colorize=False) == before


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    ModelInspector(model, (torch.randn(8, 4, generator=torch.Generator().manual_seed(1)),), "eager")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


def test_a_failing_forward_leaves_no_hooks():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match="mat1"):
        ModelInspector(model, (torch.ones(1, 3),), "eager")
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_a_thousand_layers():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(1000)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root = ModelInspector(model, (torch.ones(1, 4),), "eager").summary.model
    assert len(root.all_ops()) == 1000
    assert root.get_submodule("999").ops[0].inputs[0].op_name == "998.linear"


class Scaled(nn.Module):
    """A model whose forward has an argument that is by keyword only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return self.layer(x) * scale


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_inputs_by_keyword(mode: str):
    inputs = {"scale": torch.tensor(2.0), "x": torch.randn(2, 8)}
    inspector = ModelInspector(Scaled(), inputs, mode)
    assert sorted(op.op_type or "" for op in inspector.summary.model.all_ops()) == ["linear", "mul"]
    (scaling,) = inspector.get_matched_ops_for_op_type("mul")
    # The scale is an input of the model, not a tensor of unknown origin.
    assert scaling.inputs[1].op_name in ("input_1", "scale")
    with pytest.raises(TypeError, match=r"example_inputs does not fit Scaled\.forward"):
        ModelInspector(Scaled(), {"y": torch.randn(2, 8)}, mode)


def test_lookups_refuse_what_is_no_text():
    inspector = ModelInspector(nn.Sequential(nn.Linear(8, 8)), (torch.randn(2, 8),), "eager")
    for lookup, name in (
        (inspector.get_matched_ops_for_op_name, "pattern"),
        (inspector.get_matched_ops_for_module_name, "module_name"),
        (inspector.get_matched_ops_for_module_type, "module_type"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a .*; got 3"):
            lookup(3)  # type: ignore[arg-type]
