"""Copies and files of prepared and finalized graphs."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from coreai_opt import ExportBackend
from coreai_opt.quantization import Quantizer, QuantizerConfig

from .support import Function, flags, prepared, x

INPUTS = x(2, 3, 8, 8)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.01), nn.ReLU(), nn.Dropout(0.3), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(144, 2))


def through_file(model: nn.Module, folder: Path) -> Any:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


WAYS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "torch.save": through_file,
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def train(quantizer: Quantizer, model: Any) -> list[Tensor]:
    """Losses, and the parameters and buffers afterwards."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    seen = []
    with quantizer.training_mode(model):
        for _ in range(2):
            loss = model(INPUTS).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.detach())
    return seen + [tensor.detach().clone() for tensor in model.state_dict().values()]


@ways
def test_a_copy_trains_and_finalizes_like_the_original(way: Any, tmp_path: Path) -> None:
    quantizer, model = prepared(network(), INPUTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin = way(model, tmp_path)
    assert isinstance(twin, GraphModule)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert flags(twin) == flags(model)
    originals = {tensor.data_ptr() for tensor in model.parameters()}
    assert not originals & {tensor.data_ptr() for tensor in twin.parameters()}
    for one, other in zip(train(quantizer, twin), train(quantizer, model), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(twin.eval()(INPUTS), model.eval()(INPUTS))
    finals = [quantizer.finalize(each, backend=ExportBackend.Torch) for each in (twin, model)]
    assert torch.equal(finals[0](INPUTS), finals[1](INPUTS))
    assert not [node for node in finals[0].graph.nodes if "batch_norm" in str(node.target)]


@ways
def test_a_finalized_graph_is_copied_too(way: Any, tmp_path: Path) -> None:
    quantizer, _ = prepared(network().eval(), INPUTS)
    final: Any = quantizer.finalize(backend=ExportBackend.Torch)
    twin = way(final, tmp_path)
    assert torch.equal(twin(INPUTS), final(INPUTS))
    assert not hasattr(twin, "_coreai_opt_prepared")


@ways
def test_switches_per_module_and_kept_attributes(way: Any, tmp_path: Path) -> None:
    model = network()
    model.labels = ["a", "b"]
    quantizer, found = prepared(model, INPUTS, config=QuantizerConfig(preserved_attributes=["labels"]))
    twin = way(found, tmp_path)
    assert twin.labels == ["a", "b"]
    with quantizer.calibration_mode(twin):  # from here on the quantizer's model is the copy
        twin(INPUTS)
    quantizer.disable_fake_quant(twin.get_submodule("5"))
    assert {simulates for _, simulates in flags(twin).values()} == {True, False}
    assert all(simulates for _, simulates in flags(found).values())


@ways
def test_names_structures_dynamic_shapes_and_branches(way: Any, tmp_path: Path) -> None:
    branches = (lambda t: t.sin(), lambda t: t.cos())
    model = Function(
        lambda m, a, b: {"sum": m.fc(a) + b[0], "list": [torch.cond(a.sum() > 0, *branches, (a,)), b[1]]},
        fc=nn.Linear(4, 4),
    )
    model.forward = lambda a, b: model.function(model, a, b)  # type: ignore[method-assign]
    sizes = {0: torch.export.Dim("batch")}
    inputs = (x(2, 4), (x(2, 4), x(2, 4)))
    found: Any = Quantizer(model).prepare(inputs, dynamic_shapes=(sizes, (sizes, sizes)))
    twin = way(found, tmp_path)
    assert [node.name for node in twin.graph.nodes] == [node.name for node in found.graph.nodes]
    for batch in (2, 5):
        for sign in (1, -1):
            arguments = (sign * x(batch, 4).abs(), (x(batch, 4), x(batch, 4)))
            torch.testing.assert_close(twin(*arguments), found(*arguments), rtol=0, atol=0)


def test_an_operator_that_is_not_registered_where_the_file_is_read() -> None:
    with torch.library._scoped_library("graph_module_test", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda t: t * 2, "CompositeExplicitAutograd")
        library.impl("twice", torch.empty_like, "Meta")
        model = Function(lambda m, t: torch.ops.graph_module_test.twice(m.fc(t)), fc=nn.Linear(4, 4))
        written = pickle.dumps(prepared(model, x(2, 4))[1])
        assert pickle.loads(written)(x(2, 4)).shape == (2, 4)
    with pytest.raises(RuntimeError, match=r"torch\.ops\.graph_module_test\.twice.*import the package"):
        pickle.loads(written)
