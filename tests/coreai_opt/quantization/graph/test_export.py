"""The export, and what is said where it fails."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coreai_opt.quantization import Quantizer, QuantizerConfig
from coreai_opt.quantization._graph.export import export_model

from .support import Function, mlp, prepared, x


class Branches(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        if t.sum() > 0:
            return t
        return -t


def test_an_export_failure_names_the_line_and_ways_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Branches())
    with pytest.raises(RuntimeError) as raised:
        Quantizer(model).prepare((x(2, 4),))
    text = str(raised.value)
    assert "if t.sum() > 0:" in text
    assert "test_export.py" in text
    for hint in ("dynamic_shapes", "export_with_no_grad=False", "set_execution_mode('eager')"):
        assert hint in text
    assert model(x(2, 4)).shape == (2, 4)


def test_the_errors_of_inputs() -> None:
    with pytest.raises(TypeError, match="tuple"):
        Quantizer(mlp()).prepare([x(2, 4)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="empty"):
        Quantizer(mlp()).prepare(())


def test_the_graph_reads_the_models_tensors() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    found = export_model(model, (x(2, 4),))
    assert found.get_parameter("0.weight") is model[0].weight
    assert found.get_buffer("1.running_mean") is model[1].running_mean


@pytest.mark.parametrize("no_grad", [True, False])
def test_gradients_flow_whichever_way_it_was_exported(no_grad: bool) -> None:
    model = mlp()
    found: Any = Quantizer(model).prepare((x(2, 4),), export_with_no_grad=no_grad)
    found(x(2, 4)).sum().backward()
    assert model[0].weight.grad is not None


def test_dynamic_shapes() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.layer = nn.Embedding(9, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.layer(self.emb(tokens))

    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=64)}
    quantizer = Quantizer(Encoder())
    found: Any = quantizer.prepare((torch.ones(2, 5, dtype=torch.int64),), dynamic_shapes=(sizes,))
    compiled = torch.compile(found, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((3, 7), (4, 9), (2, 5)):
        tokens = torch.randint(9, shape)
        found.eval()
        assert found(tokens).shape == (*shape, 8)
        torch.testing.assert_close(compiled(tokens), found(tokens))
        with quantizer.training_mode():
            compiled(tokens).sum().backward()


def test_outputs_keep_their_structure() -> None:
    model = Function(lambda m, a: {"twice": m.fc(a), "both": (a, [a + 1])}, fc=nn.Linear(4, 4))
    _, found = prepared(model, x(2, 4), config=QuantizerConfig())
    output = found(x(2, 4))
    assert list(output) == ["twice", "both"]
    assert isinstance(output["both"][1], list)
