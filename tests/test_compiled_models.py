"""Compressed models under torch.compile and AOTInductor: one graph for all sizes, with eager's numbers.

COMPILED_MODELS: ``all`` takes each of the eight models of the benchmarks with each compression, which is an
hour; by default, a few. Training is compiled with aot_eager: the graphs of inductor, and none of its
code.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks.models.zoo import Batch, Task, build
from coreai_opt import ExportBackend
from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig, ModuleKMeansPalettizerConfig
from coreai_opt.palettization.spec import PalettizationSpec
from coreai_opt.pruning import MagnitudePruner, MagnitudePrunerConfig, ModuleMagnitudePrunerConfig
from coreai_opt.pruning.config import PolynomialDecaySchedule
from coreai_opt.pruning.spec import PruningSpec
from coreai_opt.quantization import Quantizer, QuantizerConfig

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
logger = logging.getLogger("coreai_opt")

MODELS = ("mlp", "cnn", "depthwise", "transposed", "lstm", "encoder", "llama", "vit")
# Batches: the first step compiles, the second may, and none of the others.
SIZES = (3, 4, 5, 6, 3)


def pruner(model: nn.Module) -> Any:
    entry = ModuleMagnitudePrunerConfig(
        op_state_spec={"weight": PruningSpec(target_sparsity=0.5)},
        sparsity_schedule=PolynomialDecaySchedule(total_iters=4),
    )
    return MagnitudePruner(model, MagnitudePrunerConfig(global_config=entry))


def palettizer(model: nn.Module) -> Any:
    spec = PalettizationSpec(n_bits=2, training_strategy_spec={"type": "straight_through"})
    entry = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    return KMeansPalettizer(model, KMeansPalettizerConfig(global_config=entry))


def eager(model: nn.Module) -> Any:
    return Quantizer(model, QuantizerConfig(execution_mode="eager"))


def graph(model: nn.Module) -> Any:
    return Quantizer(model, QuantizerConfig(execution_mode="graph"))


KINDS: dict[str, tuple[Callable[[nn.Module], Any], ...]] = {
    "eager": (eager,),
    "graph": (graph,),
    "pruned": (pruner,),
    "palettes": (palettizer,),
    "pruned, quantized": (pruner, eager),
    "palettes, quantized": (palettizer, eager),
}
USUAL = {
    ("mlp", "pruned, quantized"),
    ("mlp", "palettes, quantized"),
    ("depthwise", "pruned"),
    ("transposed", "palettes"),
    ("lstm", "graph"),
    ("encoder", "graph"),
    ("encoder", "eager"),
}

FINALIZED = [("mlp", "palettes"), ("mlp", "graph"), ("mlp", "pruned, quantized")]


def chosen() -> list[tuple[str, str]]:
    everything = [(model, kind) for model in MODELS for kind in KINDS]
    return everything if os.environ.get("COMPILED_MODELS") == "all" else [x for x in everything if x in USUAL]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    level = logger.level
    logger.setLevel(logging.ERROR)
    with torch._dynamo.config.patch(allow_rnn=True):  # or it refuses the float LSTM, too
        yield
    logger.setLevel(level)


def batches(task: Task) -> list[Batch]:
    """Of these sizes, out of one that is as large as any."""
    generator = torch.Generator().manual_seed(1)
    drawn = [task.draw(generator) for _ in range(max(SIZES))]
    inputs = tuple(torch.cat(parts) for parts in zip(*(each for each, _ in drawn), strict=True))
    target = torch.cat([each for _, each in drawn])
    return [(tuple(each[:size] for each in inputs), target[:size]) for size in SIZES]


def prepared(task: Task, kind: str, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, list[Any]]:
    model, compressors = task.model, []
    for make in KINDS[kind]:
        compressors.append(make(model))
        options: dict[str, Any] = {}
        if make is graph:
            options["dynamic_shapes"] = ({0: torch.export.Dim("batch", min=2, max=64)},)
        model = compressors[-1].prepare(inputs, **options)
    return model.train(), compressors


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {key: each.grad.clone() for key, each in named if each.grad is not None}


class Run:
    """A training: the loss and the gradients of each step, and how many graphs there were by then."""

    def __init__(self, name: str, kind: str, backend: str | None) -> None:
        task = build(name)
        data = batches(task)
        model, compressors = prepared(task, kind, data[0][0])
        run: Any = model if backend is None else compiled(model, backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        self.seen: list[dict[str, Tensor]] = []
        self.graphs: list[int] = []
        with ExitStack() as stack:
            for each in compressors:
                if not isinstance(each, MagnitudePruner):
                    stack.enter_context(each.training_mode())
            torch.manual_seed(0)
            for inputs, target in data:
                loss = task.loss(task.output(run(*inputs)), target)
                loss.backward()
                gradients = {
                    key: each.grad for key, each in model.named_parameters() if each.grad is not None
                }
                self.seen.append(
                    {"loss": loss.detach()} | {key: each.clone() for key, each in gradients.items()}
                )
                optimizer.step()
                optimizer.zero_grad()
                for each in compressors:
                    each.step()
                self.graphs.append(counters["stats"]["unique_graphs"])
        self.seen.append({key: value.clone() for key, value in model.state_dict().items()})


def compiled(model: nn.Module, backend: str) -> Any:
    return torch.compile(model, fullgraph=True, dynamic=True, backend=backend)


@pytest.mark.parametrize(("name", "kind"), chosen())
def test_training_is_one_graph_with_the_numbers_of_eager(name: str, kind: str) -> None:
    if name in ("llama", "vit"):
        pytest.importorskip("transformers")
    expected, found = Run(name, kind, None), Run(name, kind, "aot_eager")
    assert found.graphs[-1] == found.graphs[1] > 0, found.graphs
    for step, (one, other) in enumerate(zip(found.seen, expected.seen, strict=True)):
        assert list(one) == list(other)
        for key, value in other.items():
            if name == "lstm":  # the compiler takes it apart, and sums in another order
                torch.testing.assert_close(one[key], value, rtol=1e-4, atol=1e-6)
            else:
                assert torch.equal(one[key], value), f"step {step}: {key}"


@pytest.mark.parametrize(("name", "kind"), FINALIZED)
def test_aotinductor_runs_finalized_models(name: str, kind: str, tmp_path: Path) -> None:
    task = build(name)
    inputs = batches(task)[0][0]
    model, compressors = prepared(task, kind, inputs)
    model(*inputs)
    for each in compressors:
        model = each.finalize(backend=ExportBackend.Torch)
    model.eval()
    with torch.no_grad():
        expected = model(*inputs)
        program = torch.export.export(model, inputs, strict=False)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        found = torch._inductor.aoti_load_package(path)(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
