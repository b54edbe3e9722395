"""Exported programs to cast, and what a cast program looks like. The same file runs on both packages."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.casting import cast_fp32_to_fp16, cast_int32_to_int16, cast_to_16_bit_precision

__all__ = ["CASES", "answer", "describe"]

aten = torch.ops.aten
INF = float("inf")


class Fn(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


class Buffers(nn.Module):
    """Parameters, and buffers too large, too small, and infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(2, 2)
        self.register_buffer("big", torch.tensor([1e5, 1.0]))
        self.register_buffer("small", torch.tensor([1e-9, -1e-9, 0.0, INF]))
        self.register_buffer("huge", torch.tensor([3e38, -INF]), persistent=False)
        self.constant = torch.tensor([1.5, 2.5])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.l(x)
        z = y * self.big
        return (
            torch.exp(z).sum(),
            y + 1e-9,
            y * 7e4,
            y.clamp(max=3.4e38),
            torch.zeros(2, device=x.device) + y,
            self.small + 1,
            y * self.huge + self.constant,
        )


class Tied(nn.Module):
    """Two linear layers with one weight, and a buffer that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1.0)
        return self.b(torch.relu(self.a(x))) + self.count


class Network(nn.Module):
    """Convolution, norm, attention: most of what a real model has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4, eps=1e-12)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x))).flatten(2).transpose(1, 2)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return torch.softmax(self.head(x.mean(1)), -1)


class Embeds(nn.Module):
    """Indices that are computed, and integers that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(10, 4)
        self.register_buffer("off", torch.tensor([1, 2]))

    def forward(self, idx: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return self.e(idx + self.off), k * k, self.off + self.off


class Mixed(nn.Module):
    """A float product with an integer sum."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(2, 2)

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        return self.l(x) * (n + n)


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def scaled(x: Tensor) -> Tensor:
    return torch.relu(x * 1000.0 * 0.001)


def fp16(build: Callable[[], nn.Module], *inputs: Tensor, **arguments: Any) -> tuple[Any, ...]:
    return build, inputs, lambda program: cast_fp32_to_fp16(program, **arguments)


def int16(function: Callable[..., Any], *inputs: Tensor) -> tuple[Any, ...]:
    return lambda: Fn(function), inputs, cast_int32_to_int16


def fn(function: Callable[..., Any]) -> Callable[[], nn.Module]:
    return lambda: Fn(function)


def plus(x: Tensor) -> Tensor:
    return torch.exp(x) + 1.0


def chains(x: Tensor) -> tuple[Tensor, ...]:
    return (
        x.to(torch.float64).to(torch.float32) + 1,
        x.half().float() * 2,
        x.to(torch.bfloat16).to(torch.float16),
        x.double().half().float(),
        (x > 0).to(torch.float32).to(torch.int32).to(torch.float32) + x,
        x.to(torch.float32, copy=True) + 1,
    )


def creation(x: Tensor) -> tuple[Tensor, ...]:
    a, b = torch.split(x, 1)
    return (
        a * b,
        torch.full((2,), 1e6),
        torch.arange(3.0),
        torch.full((2,), -INF),
        torch.full_like(x, 1e-9),
        torch.full_like(x, 1e6) + x,
        torch.ones(2, dtype=torch.float32) + x,
        torch.zeros_like(x) * 1e-9,
        torch.scalar_tensor(2.5) * x,
        torch.arange(0, 1, 0.3) + 1,
        torch.linspace(0, 1, 2) + x,
        torch.zeros(2, dtype=torch.float64) + x,
    )


def several_results(x: Tensor) -> tuple[Tensor, ...]:
    values, indices = torch.topk(x * 1000.0, 2)
    mean = torch.var_mean(values)
    return values * 2, indices, mean[0] + mean[1], torch.where(x > 0, x, -INF), torch.stack([x, x * 2.5])


def several_users(x: Tensor) -> tuple[Tensor, ...]:
    y = torch.exp(x)
    z = y + 1.0
    return z * y, torch.log(y), torch.sin(y) * z, y


def views(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    c = a + b
    d = (a - b).transpose(0, 1)
    return c.reshape(-1)[1:] + d.reshape(-1)[:-1], (a * b).unsqueeze(0).expand(2, 2, 2), c.permute(1, 0) * d


def integers(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    s = (a * b).sum()
    c = (a + b).to(torch.int64) * b
    return s + 1, c, torch.where(a > b, a, b) - a, (a + b) // 3, torch.cat([a, a + b]), (a * b).float() * 0.5


def casts(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    c = a.to(torch.int16) + b.to(torch.int16)
    return c.to(torch.int64), c * c.to(torch.int32), (a.to(torch.int8) + b.to(torch.int8)).to(torch.int32)


def indexing(a: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return x[a + b], x.index_select(0, (a * b).reshape(-1)), torch.gather(x, 0, a - a), (a + b) * 2 + a


CASES: dict[str, tuple[Any, ...]] = {
    "buffers": fp16(Buffers, floats(1, 2)),
    "tied": fp16(Tied, floats(1, 4)),
    "network": fp16(Network, floats(1, 1, 4, 4)),
    "network-calibrated": fp16(Network, floats(1, 1, 4, 4), calibration_data=[floats(1, 1, 4, 4) * 1e5]),
    "network-ignored": fp16(Network, floats(1, 1, 4, 4), ignored_ops={aten.relu, aten.addmm.default}),
    "ignored-packet-set": fp16(fn(plus), floats(2), ignored_ops={aten.exp}),
    "ignored-overload-set": fp16(fn(plus), floats(2), ignored_ops={aten.exp.default}),
    "ignored-packet": fp16(fn(plus), floats(2), ignored_ops=aten.exp),
    "ignored-list": fp16(fn(plus), floats(2), ignored_ops=[aten.exp.default]),
    "ignored-callable": fp16(fn(plus), floats(2), ignored_ops=lambda node: node.name == "exp"),
    "ignored-add": fp16(fn(plus), floats(2), ignored_ops={aten.add.Tensor}),
    "ignored-none": fp16(fn(plus), floats(2), ignored_ops=set()),
    "ignored-casts": fp16(fn(chains), floats(2), ignored_ops={aten._to_copy.default}),
    "ignored-creation": fp16(fn(creation), floats(2, 2), ignored_ops={aten.full.default, aten.split}),
    "ignored-users": fp16(fn(several_users), floats(2), ignored_ops={aten.exp, aten.sin}),
    "ignored-results": fp16(fn(several_results), floats(3), ignored_ops={aten.topk, aten.stack}),
    "uncalibrated": fp16(fn(scaled), floats(2)),
    "calibrated": fp16(fn(scaled), floats(2), calibration_data=[torch.tensor([100.0, 1.0])]),
    "calibrated-once": fp16(fn(scaled), floats(2), calibration_data=iter([torch.tensor([65504.0, 0.0])])),
    "calibrated-infinite": fp16(fn(scaled), floats(2), calibration_data=[torch.tensor([INF, 0.0])]),
    "calibrated-nothing": fp16(fn(scaled), floats(2), calibration_data=[]),
    "calibrated-tuples": fp16(fn(scaled), floats(2), calibration_data=[torch.ones(2), (torch.ones(2) * 99,)]),
    "calibrated-two": fp16(
        fn(lambda x, y: (x * y).sum()),
        floats(2),
        floats(2),
        calibration_data=[(torch.full((2,), 300.0),) * 2],
    ),
    "calibrated-results": fp16(fn(several_results), floats(3), calibration_data=[torch.full((3,), 1e4)]),
    "calibrated-users": fp16(fn(several_users), floats(2), calibration_data=[torch.tensor([12.0, 1.0])]),
    "chains": fp16(fn(chains), floats(2)),
    "creation": fp16(fn(creation), floats(2, 2)),
    "several_results": fp16(fn(several_results), floats(3)),
    "several_users": fp16(fn(several_users), floats(2)),
    "integers-in-floats": fp16(fn(lambda x, n: (x * n, n / 2, n + 1.5, n * 7e4)), floats(2), ints(2)),
    "int-plain": int16(
        lambda a, b: (a + b, a * 2, (a - b).reshape(-1) + a.reshape(-1)), ints(2, 2), ints(2, 2)
    ),
    "int-long": int16(
        lambda a, b: (a + b, a * 2, (a - b).reshape(-1) + a.reshape(-1)),
        ints(2, 2, dtype=torch.int64),
        ints(2, 2, dtype=torch.int64),
    ),
    "int-views": int16(views, ints(2, 2), ints(2, 2)),
    "int-mixed-views": int16(views, ints(2, 2), ints(2, 2, dtype=torch.int64)),
    "int-operations": int16(integers, ints(2, 2), ints(2, 2)),
    "int-casts": int16(casts, ints(2, 2), ints(2, 2)),
    "int-indexing": int16(
        indexing, ints(2, 2, dtype=torch.int64), ints(2, 2, dtype=torch.int64), floats(4, 2)
    ),
    "int-cast-between": int16(
        lambda a, b: (torch.relu(a).to(torch.int64) * b, torch.relu((a + b).to(torch.int64))),
        ints(2, 2),
        ints(2, 2),
    ),
    "int-indices-elsewhere": int16(
        lambda a, b, x: (x[a], torch.relu(a) + b, a + a, torch.relu(a + a) * 2, torch.abs(a * a) - b),
        ints(2),
        ints(2),
        floats(4, 2),
    ),
    "int-float-sources": int16(
        lambda x, a: ((x > 0) + a, (x > 0).to(torch.int32) * (x > 1).to(torch.int64), torch.argmax(x) + a),
        floats(2),
        ints(2),
    ),
    "int-results": int16(
        lambda a, b: (*torch.topk(a + b, 1), torch.sort(a * b)[0] - a, torch.max(a - b, 0)[0] + b[0]),
        ints(2, 2),
        ints(2, 2),
    ),
    "int-gather": int16(
        lambda a, b: torch.gather(a * b, 1, b), ints(2, 2, dtype=torch.int64), ints(2, 2, dtype=torch.int64)
    ),
    "int-scalar": int16(lambda a: (a + 1, torch.relu(a), a.float()), ints(2, 2)),
    "int-constants": (
        Embeds,
        (torch.tensor([0, 1]), torch.tensor([3, 4])),
        cast_int32_to_int16,
    ),
    "both": (Mixed, (floats(2, 2), ints(2, 2)), cast_to_16_bit_precision),
    "both-embedding": (Embeds, (torch.tensor([0, 1]), torch.tensor([3, 4])), cast_to_16_bit_precision),
    "both-operations": (fn(integers), (ints(2, 2), ints(2, 2)), cast_to_16_bit_precision),
}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.fx.Node):
        return f"%{value.name}"
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, int | float | str | None) else str(value)


def _dtype(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_dtype(each) for each in value]
    return str(value.dtype) if isinstance(value, Tensor) else None


def describe(program: Any) -> dict[str, Any]:
    """The nodes in order, and the stored tensors."""
    nodes = [
        (
            node.op,
            node.name,
            str(node.target),
            _plain(node.args),
            {key: _plain(value) for key, value in node.kwargs.items()},
            _dtype(node.meta.get("val")) if node.op != "output" else None,
        )
        for node in program.graph.nodes
    ]
    stored = {**program.state_dict, **program.constants}
    return {
        "nodes": nodes,
        "stored": {
            name: (str(value.dtype), type(value).__name__, value.requires_grad, value.tolist())
            for name, value in stored.items()
            if isinstance(value, Tensor)
        },
    }


def exported(name: str) -> Any:
    """The program of a case, not yet cast."""
    build, inputs, _ = CASES[name]
    torch.manual_seed(0)
    return torch.export.export(build().eval(), inputs).run_decompositions({})


def cast(name: str) -> Any:
    """The program of a case, cast. A one-shot iterator serves once."""
    program = exported(name)
    result = CASES[name][2](program)
    assert result is program
    return result


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """The description of each cast program."""
    return {name: describe(cast(name)) for name in CASES}
