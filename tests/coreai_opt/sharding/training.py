"""Training on several ranks: what one process makes of the same global batch."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from coreai_opt._sharding.layout import whole
from coreai_opt.controllers import create_compressed_model
from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig
from coreai_opt.pruning import MagnitudePruner, MagnitudePrunerConfig
from coreai_opt.quantization import Quantizer, QuantizerConfig

BATCH, STEPS = 16, 4
CASES: dict[str, Callable[[Path], None]] = {}


def case(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CASES[function.__name__] = function
    return function


class Net(nn.Module):
    """Two linear layers, one of a size that four ranks do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 24)
        self.down = nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def batch(step: int) -> Tensor:
    return torch.randn(BATCH, 12, generator=torch.Generator().manual_seed(step))


RISING = {"type": "polynomial_decay", "begin_step": 0, "total_iters": 3}


def _pruner(model: nn.Module, scheme: dict[str, Any] | None = None, **settings: Any) -> MagnitudePruner:
    spec = {"target_sparsity": 0.6, **({"pruning_scheme": scheme} if scheme else {})}
    every = {"op_state_spec": {"weight": spec}, "sparsity_schedule": RISING}
    config = {"magnitude_pruning_config": {"global_config": every, **settings}}
    return MagnitudePruner(model, MagnitudePrunerConfig.from_dict(config))


def _quantizer(model: nn.Module, granularity: dict[str, Any] | None = None) -> Quantizer:
    weight = {"dtype": "int4", "qscheme": "symmetric"}
    if granularity is not None:
        weight["granularity"] = granularity
    every = {"op_state_spec": {"weight": weight}, "op_input_spec": None, "op_output_spec": None}
    config = {"quantization_config": {"execution_mode": "eager", "global_config": every}}
    return Quantizer(model, QuantizerConfig.from_dict(config))


def _of_activations(model: nn.Module) -> Quantizer:
    return Quantizer(model, QuantizerConfig(execution_mode="eager"))


def _palettizer(model: nn.Module, strategy: str = "default") -> KMeansPalettizer:
    spec = {
        "n_bits": 2,
        "granularity": {"type": "per_tensor"},
        "enable_per_channel_scale": True,
        "training_strategy_spec": {"type": strategy},
    }
    every = {"op_state_spec": {"weight": spec}}
    config = {"kmeans_palettization_config": {"global_config": every}}
    return KMeansPalettizer(model, KMeansPalettizerConfig.from_dict(config))


# What puts compressors on a model, in their order.
COMPRESSIONS: dict[str, tuple[Callable[[nn.Module], Any], ...]] = {
    "int4, a scale a channel": (_quantizer,),
    "int4, one scale": (lambda model: _quantizer(model, {"type": "per_tensor"}),),
    "int4, blocks of 6": (lambda model: _quantizer(model, {"type": "per_block", "block_size": 6}),),
    "pruned": (_pruner,),
    "pruned by one threshold": (lambda model: _pruner(model, global_threshold=True),),
    "pruned 1:3": (lambda model: _pruner(model, {"type": "n_m_structured", "n": 1, "m": 3}),),
    "pruned in blocks": (lambda model: _pruner(model, {"type": "block_structured", "block_size": (2, 3)}),),
    "pruned and int4": (_pruner, _quantizer),
    "palettes": (_palettizer,),
    "palettes, straight through": (lambda model: _palettizer(model, "straight_through"),),
    "palettes, soft": (lambda model: _palettizer(model, "dkm"),),
}


# Whose ranges follow what each rank sees.
COMPRESSIONS_OF_ACTIVATIONS = {"int8, activations too": (_of_activations,)}


class Run:
    """A model with its compressors and optimizer.

    Args:
        compression: a key of ``COMPRESSIONS``, or of those of activations.
        before: what is done to the model before it is prepared, and after, to train it on several ranks.
        after: see above; gives what is called.
        rank: which share of a batch to train on, of how many.
    """

    def __init__(
        self,
        compression: str,
        before: Callable[[nn.Module], Any] = lambda model: model,
        after: Callable[[nn.Module], nn.Module] = lambda model: model,
        rank: tuple[int, int] = (0, 1),
    ) -> None:
        self.model = net()
        before(self.model)
        every = COMPRESSIONS | COMPRESSIONS_OF_ACTIVATIONS
        self.compressors = [make(self.model) for make in every[compression]]
        for each in self.compressors:
            each.prepare((batch(-1),))
        self.called = after(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.rank = rank
        self.done = 0

    @contextmanager
    def _training(self) -> Iterator[None]:
        contexts = [
            nullcontext() if isinstance(each, MagnitudePruner) else each.training_mode()
            for each in self.compressors
        ]
        with contexts[0], contexts[-1] if len(contexts) > 1 else nullcontext():
            yield

    def train(self, steps: int, parts: int = 1) -> None:
        """Steps on the rank's share, in ``parts`` whose gradients are accumulated."""
        index, ranks = self.rank
        with self._training():
            for _ in range(steps):
                share = batch(self.done)[index::ranks].chunk(parts)
                for number, x in enumerate(share):
                    is_last = number == parts - 1
                    waits = isinstance(self.called, DistributedDataParallel) and not is_last
                    with self.called.no_sync() if waits else nullcontext():  # type: ignore[operator]
                        (self.called(x).square().mean() / parts).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                for each in self.compressors:
                    each.step()
                self.done += 1

    def save(self, path: Path, group: Any = None) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=path, process_group=group)

    def load(self, path: Path, done: int) -> None:
        with torch.no_grad():
            self.called(batch(0))  # gives buffers their shapes
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer}
        dcp.load(state, checkpoint_id=path)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.done = done

    def state(self) -> dict[str, Tensor]:
        full = {}
        for name, value in self.model.state_dict().items():
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            full[name] = value.detach().clone()
        return full


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Masks are equal; the rest but for the order in which gradients of ranks are added up."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith(("mask", "indices", "step_count")):
            assert torch.equal(found[name], value), f"{what}: {name}"
        else:
            torch.testing.assert_close(
                found[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{what}: {n}: {m}"
            )


def line(ranks: int) -> DeviceMesh:
    return DeviceMesh("cpu", list(range(ranks)))


def sharded(mesh: DeviceMesh) -> Callable[[nn.Module], nn.Module]:
    def shard(model: nn.Module) -> nn.Module:
        for layer in (model.up, model.down):
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    return shard


@functools.cache
def alone(compression: str, steps: int = STEPS, parts: int = 1) -> dict[str, Tensor]:
    run = Run(compression)
    run.train(steps, parts)
    return run.state()


@case
def data_parallel(folder: Path) -> None:
    """DDP of 2 and 4 ranks; the gradient of palettized weights is none, which DDP has to be told."""
    for ranks in (2, 4):
        group = dist.new_group(list(range(ranks)))
        if dist.get_rank() >= ranks:
            continue
        for compression in ("pruned and int4", "palettes", "palettes, soft")[: ranks - 1]:
            run = Run(
                compression,
                after=functools.partial(
                    DistributedDataParallel,
                    process_group=group,
                    find_unused_parameters=True,
                    broadcast_buffers=ranks == 2,
                ),
                rank=(dist.get_rank(), ranks),
            )
            run.train(STEPS)
            compare(run.state(), alone(compression), f"{compression}, {ranks} ranks")


@case
def accumulated_gradients(folder: Path) -> None:
    run = Run("pruned and int4", after=DistributedDataParallel, rank=(dist.get_rank(), 4))
    run.train(STEPS, parts=2)
    compare(run.state(), alone("pruned and int4"), "no_sync")


@case
def buffers_follow_rank_0(folder: Path) -> None:
    """Ranges of activations follow each rank's data, until DDP broadcasts those of rank 0."""
    model = net()
    quantizer = Quantizer(
        model, QuantizerConfig.from_dict({"quantization_config": {"execution_mode": "eager"}})
    )
    called = DistributedDataParallel(quantizer.prepare((batch(-1),)))
    with quantizer.training_mode():
        for step in range(3):
            called(batch(step)[dist.get_rank() :: 4] * (1 + dist.get_rank())).sum().backward()
        ranges = torch.stack([value.flatten()[0] for name, value in ranges_of(model)])
        everywhere = [torch.empty_like(ranges) for _ in range(4)]
        dist.all_gather(everywhere, ranges)
        assert not torch.equal(everywhere[0], everywhere[3])
        with torch.no_grad():
            quantizer.sync_ranges()
        ranges = torch.stack([value.flatten()[0] for name, value in ranges_of(model)])
        dist.all_gather(everywhere, ranges)
        assert all(torch.equal(each, everywhere[0]) for each in everywhere)


def ranges_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    found = [(name, value) for name, value in model.named_buffers() if name.endswith("running_max")]
    assert found
    return found


@case
def fully_sharded(folder: Path) -> None:
    for ranks in (2, 4):
        mesh = line(ranks)
        if dist.get_rank() >= ranks:
            continue
        # Quantizers see whole weights, whatever their granularity.
        others = [name for name in COMPRESSIONS if not name.startswith("int4")]
        for compression in others if ranks == 4 else ("pruned and int4",):
            run = Run(compression, after=sharded(mesh), rank=(dist.get_rank(), ranks))
            run.train(STEPS)
            compare(run.state(), alone(compression), f"{compression}, {ranks} ranks")


def trained_graph(rank: tuple[int, int] = (0, 1), mesh: DeviceMesh | None = None) -> dict[str, Tensor]:
    """What a graph with quantized weights holds after some steps on the rank's share of each batch."""
    config = _quantizer(net())._config.model_copy(deep=True).set_execution_mode("graph")
    quantizer = Quantizer(net(), config)
    model = quantizer.prepare((batch(-1),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    called = model if mesh is None else fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with quantizer.training_mode():
        for step in range(STEPS):
            called(batch(step)[rank[0] :: rank[1]]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return {name: whole(value).detach().clone() for name, value in model.state_dict().items()}


@case
def fully_sharded_graphs(folder: Path) -> None:
    compare(trained_graph((dist.get_rank(), 4), line(4)), trained_graph(), "a graph, 4 ranks")


@case
def controllers_refuse_sharded_models(folder: Path) -> None:
    """Under tensor parallelism, where parameters are sharded before."""
    model = parallelize_module(net(), init_device_mesh("cpu", (4,)), PLAN)
    with pytest.raises(RuntimeError, match="Under tensor parallelism"):
        create_compressed_model(model, {"compression": {"algorithm": "magnitude_sparsity"}})


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


@case
def tensor_parallel(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (4,))
    for compression in COMPRESSIONS:
        run = Run(compression, before=lambda model: parallelize_module(model, mesh, PLAN))
        run.train(STEPS)
        compare(run.state(), alone(compression), compression)


@case
def activations_between_tensor_parallel_layers(folder: Path) -> None:
    """As DTensors, sums that are pending among them, they have the ranges of the whole."""
    mesh = init_device_mesh("cpu", (4,))
    plan = {
        "up": ColwiseParallel(use_local_output=False),
        "down": RowwiseParallel(input_layouts=Shard(-1)),
    }
    run = Run("int8, activations too", before=lambda model: parallelize_module(model, mesh, plan))
    run.train(STEPS)
    compare(run.state(), alone("int8, activations too"), "int8")


@case
def tensor_parallel_and_fully_sharded(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for compression in ("pruned and int4", "pruned by one threshold", "palettes"):
        run = Run(
            compression,
            before=lambda model: parallelize_module(model, mesh["tensor"], PLAN),
            after=sharded(mesh["data"]),
            rank=(mesh.get_local_rank("data"), 2),
        )
        run.train(STEPS)
        compare(run.state(), alone(compression), compression)


@case
def checkpoints_on_other_numbers_of_ranks(folder: Path) -> None:
    """Saved by two ranks in mid-schedule; four ranks, and one process, go on from there."""
    for number, compression in enumerate(("pruned and int4", "palettes, straight through")):
        path = folder / f"checkpoint-{number}"
        mesh, group = line(2), dist.new_group([0, 1])
        if dist.get_rank() < 2:
            run = Run(compression, after=sharded(mesh), rank=(dist.get_rank(), 2))
            run.train(2)
            run.save(path, group)
        dist.barrier()
        run = Run(compression, after=sharded(line(4)), rank=(dist.get_rank(), 4))
        one = Run(compression)
        expected = alone(compression)
        for each in (run, one):
            each.load(path, 2)
            each.train(STEPS - 2)
            compare(each.state(), expected, f"{compression}, {'4 ranks' if each is run else 'alone'}")


@case
def order_of_sharding_and_preparing(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (4,))
    for make in (_quantizer, _pruner, _palettizer):
        model = sharded(mesh)(net())
        try:
            make(model).prepare((batch(-1),))
        except RuntimeError as error:
            assert "Prepare the model first" in str(error)  # noqa: PT017
        else:
            raise AssertionError("prepare took a sharded model")
        compressor = make(net())
        sharded(mesh)(compressor.prepare((batch(-1),)))
        try:
            compressor.finalize()
        except RuntimeError as error:
            assert "whole parameters" in str(error)  # noqa: PT017
        else:
            raise AssertionError("finalize took a sharded model")
