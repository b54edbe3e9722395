"""Masks and ranges of sharded tensors: those of the whole ones, bit for bit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import coreai_kernels
from coreai_opt._sharding import masks
from coreai_opt._sharding.layout import part_of
from coreai_opt._sharding.ranges import observe_range
from coreai_opt._sharding.selecting import topk_masks

CASES: dict[str, Callable[[Path], None]] = {}


def case(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CASES[function.__name__] = function
    return function


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (4,))


def square() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))


def placed(weight: Tensor) -> Iterator[DTensor]:
    """The weight on both meshes, cut in several ways; of some, ranks hold unequal shares, or nothing."""
    ways: list[tuple[DeviceMesh, list[Placement]]] = [
        (line(), [Shard(0)]),
        (line(), [Shard(1)]),
        (square(), [Shard(0), Shard(1)]),
        (square(), [Replicate(), Shard(0)]),
        (square(), [Shard(0), Replicate()]),
    ]
    for mesh, placements in ways:
        yield distribute_tensor(weight, mesh, placements)


@contextmanager
def nothing_gathered() -> Iterator[None]:
    """An error where a tensor of floating-point values is brought together."""
    full_tensor = DTensor.full_tensor

    def watched(self: DTensor, **kwargs: object) -> Tensor:
        assert not self.is_floating_point(), "a weight was gathered"
        return full_tensor(self, **kwargs)

    with mock.patch.object(DTensor, "full_tensor", watched):
        yield


def weight_with_ties(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-5, 6, shape, generator=generator).to(dtype) / 4
    flat = weight.view(-1)
    flat[3], flat[7], flat[11], flat[-2] = float("nan"), float("inf"), -float("inf"), float("nan")
    flat[5], flat[6] = -0.0, torch.finfo(dtype).smallest_normal / 2
    return weight


def check(found: Tensor, expected: Tensor) -> None:
    assert isinstance(found, DTensor)
    assert found.dtype == expected.dtype
    assert torch.equal(found.full_tensor(), expected)


@case
def topk(folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weight = weight_with_ties((7, 10), dtype)
        for sharded in placed(weight):
            for keep in (0, 1, 33, 69, 70):
                with nothing_gathered():
                    found = masks.topk_mask(sharded, keep)
                check(found, coreai_kernels.topk_mask(weight, keep))


@case
def topk_of_groups(folder: Path) -> None:
    """Three groups at once: tensors ranked alone, together, and some that each rank has whole."""
    first, second = weight_with_ties((7, 10), torch.float32), weight_with_ties((2, 1024), torch.float16)
    for a, b in zip(placed(first), placed(second), strict=True):
        copy = distribute_tensor(second, b.device_mesh, [Replicate()] * b.device_mesh.ndim)
        with nothing_gathered():
            found = topk_masks([([a], 30), ([b, a], 500), ([copy, a], 500)])
        together = coreai_kernels.topk_masks([second, first], 500)
        expected = [[(a, coreai_kernels.topk_mask(first, 30))]]
        expected += [[(tensor, together[0]), (a, together[1])] for tensor in (b, copy)]
        for of_group, wanted in zip(found, expected, strict=True):
            for local, (tensor, mask) in zip(of_group, wanted, strict=True):
                assert torch.equal(local, part_of(tensor).cut(mask))


@case
def groups_of_m(folder: Path) -> None:
    for shape in ((8, 16), (12, 24), (20, 4)):
        weight = weight_with_ties(shape, torch.float32)
        for sharded in placed(weight):
            for axis in (0, 1):
                with nothing_gathered():
                    found = masks.nm_mask(sharded, 2, 4, axis)
                check(found, coreai_kernels.nm_mask(weight, 2, 4, axis))


@case
def groups_of_m_cut_by_two_axes_of_the_mesh(folder: Path) -> None:
    weight = weight_with_ties((12, 4), torch.float32)
    sharded = distribute_tensor(weight, square(), [Shard(0), Shard(0)])
    check(masks.nm_mask(sharded, 1, 4, 0), coreai_kernels.nm_mask(weight, 1, 4, 0))


@case
def blocks_and_channels(folder: Path) -> None:
    torch.manual_seed(1)
    for weight in (weight_with_ties((6, 12), torch.float32), torch.randn(6, 12).bfloat16()):
        for sharded in placed(weight):
            with nothing_gathered():
                found = [masks.block_mask(sharded, 5, (2, 3)), masks.channel_mask(sharded, 4, 1)]
            check(found[0], coreai_kernels.block_mask(weight, 5, (2, 3)))
            check(found[1], coreai_kernels.channel_mask(weight, 4, 1))


@case
def ranges(folder: Path) -> None:
    torch.manual_seed(2)
    for weight in (weight_with_ties((6, 12), torch.float32), torch.randn(6, 12).bfloat16()):
        for sharded in placed(weight):
            for block_size in ((6, 12), (1, 12), (6, 1), (2, 4), (1, 6), (3, 12)):
                with nothing_gathered():
                    found = observe_range(sharded, block_size)
                expected = coreai_kernels.observe_range(weight, block_size=block_size)
                for mine, other in zip(found, expected, strict=True):
                    assert mine.dtype == other.dtype
                    assert torch.equal(mine.isnan(), other.isnan())
                    assert torch.equal(mine.nan_to_num(9), other.nan_to_num(9))


@case
def parts_under_fsdp_and_tensor_parallelism(folder: Path) -> None:
    """What a rank holds of a tensor that both cut along one axis is where the layout says."""
    mesh = square()
    weight = torch.arange(96.0).reshape(12, 8)
    layer = torch.nn.Linear(8, 12, bias=False)
    layer.weight = torch.nn.Parameter(distribute_tensor(weight, mesh["tensor"], [Shard(0)]))
    fully_shard(layer, mesh=mesh["data"])
    part = part_of(layer.weight)
    assert torch.equal(part.cut(weight), part.local)
    assert len(part.groups) == 2
    check(masks.topk_mask(layer.weight, 31), coreai_kernels.topk_mask(weight, 31))
