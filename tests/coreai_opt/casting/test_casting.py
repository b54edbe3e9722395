"""What a cast program computes, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coreai_opt.casting import cast_fp32_to_fp16, cast_int32_to_int16, cast_to_16_bit_precision

aten = torch.ops.aten


class Fn(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def export(model: Any, *inputs: Tensor) -> torch.export.ExportedProgram:
    module = model if isinstance(model, nn.Module) else Fn(model)
    return torch.export.export(module.eval(), inputs).run_decompositions({})


def names(program: torch.export.ExportedProgram) -> list[str]:
    return [node.name for node in program.graph.nodes if node.op == "call_function"]


def test_a_network_in_half_precision_computes_nearly_the_same():
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)
    ).eval()
    x = torch.randn(2, 1, 8, 8)
    program = cast_fp32_to_fp16(export(layers, x))
    result = program.module()(x.half())
    assert result.dtype == torch.float16
    torch.testing.assert_close(result.float(), layers(x), atol=2e-3, rtol=2e-2)
    # The module that was exported keeps its parameters.
    assert all(parameter.dtype == torch.float32 for parameter in layers.parameters())


def test_metadata_says_what_the_program_computes():
    def mixed(x: Tensor, y: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        z = (x * 2.5 + y.float()) / n
        return torch.stack([z, z.exp()]).sum(0) > 1e-9, y * 1e-12, z + y, z.topk(1)[0], z * 1e6

    x, y, n = torch.randn(3), torch.randn(3, dtype=torch.float64), torch.tensor([1, 2, 3])
    program = cast_fp32_to_fp16(export(mixed, x, y, n))
    values = dict(
        zip(
            [node.name for node in program.graph.nodes if node.op == "placeholder"],
            (x.half(), y, n),
            strict=True,
        )
    )

    class Checked(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                assert result.dtype == n.meta["val"].dtype, n.name
            return result

    results = Checked(program.graph_module).run(*values.values())
    assert [result.dtype for result in results] == [
        torch.bool,
        torch.float64,
        torch.float64,
        torch.float16,
        torch.float16,
    ]
    # float64 numbers are not raised to the smallest of float16.
    assert torch.equal(results[1], y * 1e-12)


def test_overflowing_operations_stay_in_float32():
    def scaled(x: Tensor) -> Tensor:
        return torch.relu(x * 1000.0 * 0.001)

    x = torch.tensor([100.0, 1.0])
    plain = cast_fp32_to_fp16(export(scaled, x)).module()(x.half())
    assert torch.isinf(plain).any()
    kept = cast_fp32_to_fp16(export(scaled, x), calibration_data=[x]).module()(x.half())
    torch.testing.assert_close(kept, x.half())


def test_integers_become_int16_and_results_int32():
    a, b = torch.tensor([1, 2], dtype=torch.int32), torch.tensor([3, 4], dtype=torch.int32)
    program = cast_int32_to_int16(export(lambda a, b: (a + b, a * b - a), a, b))
    first, second = program.module()(a.to(torch.int16), b.to(torch.int16))
    assert first.dtype == second.dtype == torch.int32
    assert (first.tolist(), second.tolist()) == ([4, 6], [2, 6])


def test_both_casts():
    x, n = torch.randn(2), torch.tensor([1, 2], dtype=torch.int32)
    program = cast_to_16_bit_precision(export(lambda x, n: x * (n + n), x, n))
    result = program.module()(x.half(), n.to(torch.int16))
    assert torch.equal(result, x.half() * (n + n))


def test_buffers_that_are_written_stay_consistent():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1.0)
            return x + self.count

    program = cast_fp32_to_fp16(export(Counts(), torch.zeros(2)))
    module = program.module()
    x = torch.zeros(2, dtype=torch.float16)
    assert module(x).tolist() == [1.0, 1.0]
    assert module(x).tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (torch.ones(2), TypeError, "got Tensor"),
        ({"x": torch.ones(2)}, TypeError, "got dict"),
        ("ab", TypeError, "got str"),
        (5, TypeError, "got int"),
        ([3], TypeError, "got int"),
        ([{"q": 1}], ValueError, r"lacks the inputs \['args_0'\]"),
        ([(torch.ones(2), torch.ones(2))], ValueError, "has 2 inputs; the program takes 1"),
    ],
)
def test_bad_calibration_data(data: Any, error: type[Exception], words: str):
    program = export(torch.exp, torch.ones(2))
    before = str(program)
    with pytest.raises(error, match=words):
        cast_fp32_to_fp16(program, calibration_data=data)
    assert str(program) == before


@pytest.mark.parametrize("ignored", ["exp", 5, ["exp"], [aten.exp, None]])
def test_ignored_operations_must_be_operations(ignored: Any):
    # Apple's package takes a string as a set of characters and ignores nothing.
    with pytest.raises(TypeError, match="ignored_ops must"):
        cast_fp32_to_fp16(export(torch.exp, torch.ones(2)), ignored_ops=ignored)


@pytest.mark.parametrize("function", [cast_fp32_to_fp16, cast_int32_to_int16, cast_to_16_bit_precision])
def test_programs_only(function: Callable[..., Any]):
    with pytest.raises(TypeError, match="exported_program must be an ExportedProgram"):
        function(nn.ReLU())
