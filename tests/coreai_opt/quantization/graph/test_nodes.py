"""Types of operations, as configurations name them, and what counts as a parameter."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coreai_opt.quantization._graph.export import export_model
from coreai_opt.quantization._graph.nodes import is_quantizable, is_state, module_stack, op_type

from .support import Function, mlp, x


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, a, b: a + b, ["add"]),
        (lambda m, a, b: 1 + a, ["add"]),
        (lambda m, a, b: 1 - a, ["__rsub__"]),
        (lambda m, a, b: torch.multiply(a, b), ["multiply"]),
        (lambda m, a, b: a @ b.t(), ["t", "matmul"]),
        (lambda m, a, b: F.softsign(a), ["softsign"] * 3),
        (lambda m, a, b: a[0], ["__getitem__"]),
        (lambda m, a, b: F.relu(a, inplace=True), ["relu"]),
        (lambda m, a, b: a.clone().relu_(), ["clone", "relu_"]),
    ],
)
def test_the_type_is_the_function_that_the_model_calls(function: Any, expected: list[str]) -> None:
    graph = export_model(Function(function), (x(2, 4), x(2, 4))).graph
    assert [op_type(node) for node in graph.nodes if node.op == "call_function"] == expected


def test_modules_states_and_tensors() -> None:
    model = nn.Sequential(mlp(), nn.Softmax(-1))
    nodes = {node.name: node for node in export_model(model, (x(1, 4),)).graph.nodes}
    assert list(module_stack(nodes["linear_1"])) == ["", "0", "0.2"]
    assert {name for name, node in nodes.items() if is_state(node)} == {
        f"_0_{layer}_{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    assert is_quantizable(nodes["softmax"])
    assert not is_quantizable(nodes["output"])


def test_integers_and_single_elements_are_not_quantizable() -> None:
    graph = export_model(Function(lambda m, a, i: (a.mean(), i + 1, a + 1)), (x(2, 4), torch.arange(3))).graph
    found = {node.name: is_quantizable(node) for node in graph.nodes if node.op == "call_function"}
    assert found == {"mean": False, "add": False, "add_1": True}
