"""The table of operations against brute force: zero an entry, see which entries of the result change."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreai_opt.controllers.structures.follow import follow
from coreai_opt.controllers.structures.operations import OPERATIONS

C = 8
Case = tuple[str, Callable[[Tensor, Tensor], Any]]

# On [batch, channels, height, width], with a second tensor of other convolution's channels.
MAPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{
        name: (lambda x, _, name=name: getattr(torch, name)(x))
        for name in (
            "abs",
            "neg",
            "sin",
            "cos",
            "exp",
            "sigmoid",
            "tanh",
            "sqrt",
            "square",
            "sign",
            "rsqrt",
            "reciprocal",
            "log1p",
            "erf",
            "expm1",
            "tan",
        )
    },
    **{
        name: (lambda x, _, name=name: getattr(F, name)(x))
        for name in (
            "relu",
            "relu6",
            "elu",
            "celu",
            "selu",
            "gelu",
            "silu",
            "mish",
            "hardswish",
            "hardsigmoid",
            "leaky_relu",
            "softplus",
            "softsign",
            "logsigmoid",
            "hardtanh",
            "hardshrink",
            "softshrink",
            "tanhshrink",
        )
    },
    **{
        name: (lambda x, _, name=name: getattr(F, name)(x, training=False))
        for name in ("rrelu", "dropout", "dropout2d", "alpha_dropout")
    },
    "threshold": lambda x, _: F.threshold(x, 0.1, 5.0),
    "relu_": lambda x, _: F.relu(x.clone(), inplace=True),
    "hardtanh away": lambda x, _: F.hardtanh(x, 0.5, 1.0),
    "clamp": lambda x, _: x.clamp(-1, 2),
    "clamp_min": lambda x, _: x.clamp(min=0.25),
    "clamp_max": lambda x, _: x.clamp(max=-0.25),
    "clip_keyword": lambda x, _: torch.clamp(x, max=0.5),
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "add number": lambda x, _: x + 1.0,
    "rsub": lambda x, _: 1 - x,
    "mul": lambda x, y: x * y,
    "mul number": lambda x, _: x * 3,
    "div": lambda x, y: x / (y + 3),
    "div number": lambda x, _: x / 3,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "where": lambda x, y: torch.where(x > 0, x, y),
    "pow": lambda x, _: x**2,
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "max_pool2d": lambda x, _: F.max_pool2d(x, 2),
    "avg_pool2d": lambda x, _: F.avg_pool2d(x, 2, padding=1),
    "adaptive_avg_pool2d": lambda x, _: F.adaptive_avg_pool2d(x, 2),
    "adaptive_max_pool2d": lambda x, _: F.adaptive_max_pool2d(x, 2),
    "lp_pool2d": lambda x, _: F.lp_pool2d(x, 2, 2),
    "nearest": lambda x, _: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x, _: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bicubic": lambda x, _: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "area": lambda x, _: F.interpolate(x, size=2, mode="area"),
    "pad": lambda x, _: F.pad(x, (1, 2, 3, 0)),
    "pad value": lambda x, _: F.pad(x, (1, 1), value=2.0),
    "pad channels": lambda x, _: F.pad(x, (0, 0, 0, 0, 1, 1)),
    "reflect": lambda x, _: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "replicate": lambda x, _: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "softmax of rows": lambda x, _: x.softmax(2),
    "softmax of channels": lambda x, _: x.softmax(1),
    "cumsum of rows": lambda x, _: x.cumsum(3),
    "cumsum of channels": lambda x, _: x.cumsum(1),
    "slice of rows": lambda x, _: x[:, :, 1:3],
    "slice of channels": lambda x, _: x[:, 1:5],
    "flip": lambda x, _: x.flip(3),
    "flip channels": lambda x, _: x.flip(1),
    "roll": lambda x, _: x.roll(1, 2),
    "roll channels": lambda x, _: x.roll(1, 1),
    "mean": lambda x, _: x.mean((2, 3)),
    "mean kept": lambda x, _: x.mean((2, 3), keepdim=True),
    "mean of batch": lambda x, _: x.mean(0),
    "mean of channels": lambda x, _: x.mean(1),
    "mean of all": lambda x, _: x.mean(),
    "sum": lambda x, _: x.sum(-1),
    "amax": lambda x, _: x.amax((2, 3)),
    "layer_norm of rows": lambda x, _: F.layer_norm(x, (4,)),
    "layer_norm of all": lambda x, _: F.layer_norm(x, (C, 4, 4)),
    "batch_norm": lambda x, _: F.batch_norm(x, None, None, training=True),
    "instance_norm": lambda x, _: F.instance_norm(x),
    "group_norm of each": lambda x, _: F.group_norm(x, C),
    "group_norm": lambda x, _: F.group_norm(x, 2),
    "matmul": lambda x, y: x @ y.transpose(2, 3),
    "matmul across": lambda x, _: x.flatten(2).transpose(1, 2) @ x.flatten(2),
    "attention": lambda x, y: F.scaled_dot_product_attention(x, y, y),
    "cat": lambda x, y: torch.cat([x, y], 1),
    "cat of rows": lambda x, y: torch.cat([x, y], 2),
    "stack": lambda x, y: torch.stack([x, y], 1),
    "stack behind": lambda x, y: torch.stack([x, y], -1),
    "split of rows": lambda x, _: x.split(2, dim=2)[1],
    "split of channels": lambda x, _: x.split(4, dim=1)[1],
    "chunk of channels": lambda x, _: x.chunk(2, dim=1)[0],
    "chunk of rows": lambda x, _: x.chunk(2, dim=3)[0],
    "unbind": lambda x, _: x.unbind(2)[0],
    "unbind of batch": lambda x, _: x.unbind(0)[1],
    "select": lambda x, _: x[:, :, 0],
    "select of batch": lambda x, _: x[0],
    "select channel": lambda x, _: x[:, 3],
    "expand": lambda x, _: x[:, :, :1].expand(-1, -1, 5, -1),
    "transpose": lambda x, _: x.transpose(1, 2),
    "permute": lambda x, _: x.permute(0, 2, 3, 1),
    "moveaxis": lambda x, _: x.movedim((1, 3), (2, 0)),
    "movedim": lambda x, _: x.movedim(1, -1),
    "unsqueeze": lambda x, _: x.unsqueeze(1),
    "squeeze": lambda x, _: x[:, :, :1].squeeze(2),
    "flatten": lambda x, _: x.flatten(1),
    "flatten rows": lambda x, _: x.flatten(2),
    "flatten batch": lambda x, _: x.flatten(0, 1),
    "view heads": lambda x, _: x.view(2, 2, 4, 4, 4),
    "view across": lambda x, _: x.reshape(2, 4, 4, C),
    "unflatten": lambda x, _: x.unflatten(1, (4, 2)),
    "pixel_shuffle": lambda x, _: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x, _: F.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda x, _: F.channel_shuffle(x, 2),
    "glu": lambda x, _: F.glu(x, 1),
    "sort": lambda x, _: x.sort(1).values,
    "einsum across": lambda x, _: torch.einsum("bchw,bdhw->bcd", x, x),
    "index_select": lambda x, _: x.index_select(2, torch.tensor([0, 2])),
    "to": lambda x, _: x.double(),
    "contiguous": lambda x, _: x.contiguous(),
}


MIXES = {
    "pad channels", "softmax of channels", "cumsum of channels", "slice of channels", "flip channels",
    "roll channels", "mean of channels", "mean of all", "layer_norm of all", "group_norm", "matmul across",
    "split of channels", "chunk of channels", "select channel", "flatten batch", "channel_shuffle", "glu",
    "sort", "einsum across",
}  # fmt: skip


class Probe(nn.Module):
    """An operation on the outputs of two convolutions, each with channels of its own."""

    def __init__(self, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, C, 1), nn.Conv2d(3, C, 1)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(self.first(x), self.second(x))


def masked(model: Probe, unit: int, units: int, layers: list[str]) -> Probe:
    copy = Probe(model.operation).eval()
    copy.load_state_dict(model.state_dict())
    size = C // units
    with torch.no_grad():
        for name in layers:
            layer = copy.get_submodule(name)
            layer.weight[unit * size : (unit + 1) * size] = 0
            layer.bias[unit * size : (unit + 1) * size] = 0
    return copy


@pytest.mark.parametrize("name", MAPS)
def result(state: Any) -> Any:
    """What the table says of the model's output; None if its channels were mixed on the way."""
    if any("mixes" in reason for reason in state.fixed.values()):
        return None
    (node,) = [each for each in state.values if any(user.op == "output" for user in each.users)]
    return state.values[node]


@pytest.mark.parametrize("name", MAPS)
def test_an_operation_does_what_the_table_says(name: str) -> None:
    torch.manual_seed(0)
    model = Probe(MAPS[name]).eval()
    x = torch.randn(2, 3, 4, 4)
    state = follow(model, (x,), {})
    value = result(state)
    if value is None:
        assert name in MIXES
        return
    with torch.no_grad():
        whole = model(x)
    assert value.entries == whole.shape[value.axis]
    moved = 0
    for root in {state.root(segment.source) for segment in value.segments}:
        layers = [n for s, names in state.producers.items() if state.root(s) == root for n in names]
        units = state.units[root]
        for unit in range(units):
            with torch.no_grad():
                changed = masked(model, unit, units, layers)(x)
            # The unit's entries may change, and no others; they are zero if the table says so.
            mine = torch.cat(
                [
                    (torch.arange(s.entries) // (s.entries // units) == unit) & (state.root(s.source) == root)
                    for s in value.segments
                ]
            )
            before, after = whole.movedim(value.axis, 0), changed.movedim(value.axis, 0)
            torch.testing.assert_close(after[~mine], before[~mine], equal_nan=True)
            moved += not torch.equal(after[mine], before[mine])
            if value.zero:
                assert not bool(after[mine].any())
    assert moved or name == "hardtanh away"


@pytest.mark.parametrize("name", MAPS)
def test_what_is_kept_apart(name: str) -> None:
    """An operation that keeps channels apart is followed; one that mixes them is not."""
    state = follow(Probe(MAPS[name]).eval(), (torch.randn(2, 3, 4, 4),), {})
    mixes = any("mixes" in reason for reason in state.fixed.values())
    assert mixes == (name in MIXES), state.fixed


def test_the_table_has_behaviours() -> None:
    assert all(callable(each) for each in OPERATIONS.values())
    assert not {name for name in OPERATIONS if name.endswith("_")}
