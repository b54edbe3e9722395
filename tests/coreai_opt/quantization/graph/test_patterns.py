"""What is quantized as one operation."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coreai_opt.quantization._graph.export import export_model
from coreai_opt.quantization._graph.patterns import OperationPattern, find_matches

from .support import Function, prepared, simulators, x


def matches(model: nn.Module, *inputs: torch.Tensor) -> list[tuple[str, ...]]:
    graph = export_model(model, inputs).graph
    return [tuple(node.name for node in match.nodes) for match in find_matches(graph)]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ((nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU6()), [("conv2d", "batch_norm", "hardtanh")]),
        ((nn.Conv2d(1, 2, 1), nn.GELU()), [("conv2d", "gelu")]),
        ((nn.Conv2d(1, 2, 1), nn.Softplus()), [("conv2d",)]),
        ((nn.ConvTranspose2d(1, 2, 1, bias=False), nn.BatchNorm2d(2)), [("conv_transpose2d", "batch_norm")]),
        ((nn.Conv2d(1, 2, 1, padding="same"), nn.SiLU(inplace=True)), [("conv2d", "silu_")]),
        ((nn.MaxPool2d(1), nn.Flatten()), [("max_pool2d",), ("flatten",)]),
        ((nn.LayerNorm(3), nn.ReLU()), []),
    ],
)
def test_layers(layers: tuple[nn.Module, ...], expected: list[tuple[str, ...]]) -> None:
    assert matches(nn.Sequential(*layers).eval(), x(2, 1, 3, 3)) == expected


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, a: torch.relu(a + a), [("add", "relu")]),
        (lambda m, a: torch.relu(a - 1), [("sub",)]),
        (lambda m, a: (y := a * 2, torch.relu(y)), [("mul",)]),
        (lambda m, a: torch.softmax(a @ a, -1), [("matmul", "softmax")]),
        (lambda m, a: F.linear(a, a), []),
        (lambda m, a: (a + 1).relu_(), [("add",)]),
        (lambda m, a: torch.cat([a, a]), [("cat",)]),
    ],
)
def test_functions(function: Any, expected: list[tuple[str, ...]]) -> None:
    assert matches(Function(function), x(3, 3)) == expected


def test_a_value_that_is_read_elsewhere_ends_the_operation() -> None:
    model = Function(lambda m, a: (y := m.fc(a), torch.relu(y)), fc=nn.Linear(3, 3))
    assert matches(model, x(3, 3)) == [("linear",)]


@pytest.fixture
def own_pattern() -> Iterator[None]:
    @OperationPattern.register("bmm")
    class Bmm(OperationPattern):
        op_types = frozenset({"bmm"})
        takes_activation = True

    yield
    del OperationPattern.REGISTRY["bmm"]


def test_a_registered_pattern_quantizes_its_operations(own_pattern: None) -> None:
    model = Function(lambda m, a, b: torch.relu(torch.bmm(a, b)))
    _, found = prepared(model, x(2, 3, 3), x(2, 3, 3))
    assert len(simulators(found)) == 3


def test_without_a_pattern_they_are_not_quantized() -> None:
    model = Function(lambda m, a, b: torch.relu(torch.bmm(a, b)))
    _, found = prepared(model, x(2, 3, 3), x(2, 3, 3))
    assert not simulators(found)
