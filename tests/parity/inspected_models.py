"""Models whose inspection shows what a record is, and a dump of all records.

Public names only: the same file runs on both packages.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreai_opt.inspection import ModelInspector, ModuleInfo
from coreai_opt.palettization import KMeansPalettizer
from coreai_opt.quantization import Quantizer

__all__ = ["MODELS", "answer", "dump"]


class Halves(nn.Module):
    """Reads two tensors, returns two, and makes both from pieces of one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.fc(x).chunk(2, dim=-1)
        return a + y, b * 2.0


class Aliased(nn.Module):
    """One block under two names, a buffer, and a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.bn = nn.BatchNorm2d(2)
        self.block = Halves()
        self.again = self.block
        self.plain = torch.ones(2)
        self.register_buffer("shift", torch.ones(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.bn(self.conv(x))).mean(dim=2)
        u, v = self.block(x, self.plain)
        w, _ = self.again(x, u)
        return u + self.shift, torch.matmul(v, w.transpose(1, 2))


class InPlace(nn.Module):
    """Operations in place, a module called twice, a dict as the result."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.ones(2)
        self.lin = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.add(x, self.plain)
        y.mul_(2.0)
        y += x
        y -= 1
        z = self.lin(self.lin(y))
        return {"a": z, "b": torch.cat([y, x])}


class Pieces(nn.Module):
    """Results in several slots, indexing, arguments that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.ones(2)

    def forward(self, a: Tensor, b: Tensor, k: Any = None) -> tuple[Tensor, ...]:
        c = torch.add(a, self.plain)
        d = b + c
        s = torch.split(d, 1, dim=-1)
        return F.relu(s[0]) + s[1], c[0], d.sum()


class Nested(nn.Module):
    """Lists and dicts of modules, keywords, a module handed to another, one without operations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Identity())])
        self.heads = nn.ModuleDict({"left": nn.Linear(4, 2), "right": nn.Linear(4, 2)})
        self.caller = Caller()
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float, mask: Tensor) -> list[Tensor]:
        for layer in self.layers:
            x = layer(x)
        x = self.caller(x, module=self.heads["left"], factor=mask) * scale
        return [x, self.heads["right"](x.repeat(1, 2)), x]


class Caller(nn.Module):
    """Calls a module that belongs to another one."""

    def forward(self, x: Tensor, module: nn.Module, factor: Tensor) -> Tensor:
        return module(x + x) * factor


class PassThrough(nn.Module):
    """Identity is called twice on different tensors, and an input is returned as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Identity()
        self.act = nn.ReLU()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        u = self.same(torch.sin(x))
        v = self.same(torch.cos(y))
        return self.act(u) + self.act(v), x


class Operators(nn.Module):
    """Every operator that a quantizer knows, and some that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.emb = nn.Embedding(5, 4)
        self.pool = nn.MaxPool2d(2)
        self.avg = nn.AdaptiveAvgPool2d(2)
        self.up = nn.ConvTranspose1d(4, 2, 3)

    def forward(self, ids: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        e = self.emb(ids)
        y = e @ e.transpose(0, 1) - 1
        z = 1 - (2 * y + 3) / 2
        w = torch.einsum("ij,jk->ik", z, z) ** 2
        v = e * self.weight - e
        up = torch.sigmoid(self.up(v.T.unsqueeze(0)))
        return F.softmax(w, -1), v.mean(0), self.avg(self.pool(x)).flatten(1), F.relu(up, inplace=True)


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "perceptron": (_perceptron, lambda: (_draw(1, 10),)),
    "aliased": (Aliased, lambda: (_draw(1, 1, 4, 4),)),
    "in_place": (InPlace, lambda: (_draw(1, 2),)),
    "pieces": (Pieces, lambda: (_draw(1, 2), _draw(1, 2))),
    "pieces_with_number": (Pieces, lambda: (_draw(1, 2), _draw(1, 2), 3)),
    "nested": (Nested, lambda: (_draw(1, 4), 0.5, torch.ones(1, 2))),
    "pass_through": (PassThrough, lambda: (_draw(2), _draw(2))),
    "operators": (Operators, lambda: (torch.tensor([1, 2, 3, 4]), _draw(1, 2, 8, 8))),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0),
        lambda: (_draw(1, 3, 8),),
    ),
    "recurrent": (lambda: nn.LSTM(4, 3, batch_first=True), lambda: (_draw(1, 5, 4),)),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), lambda: (_draw(1, 4),)),
}
COMPRESSORS = {"none": None, "quantizer": Quantizer, "palettizer": KMeansPalettizer}


def _module(info: ModuleInfo) -> dict[str, Any]:
    return {
        "type": info.module_type,
        "children": list(info.child_modules),
        "inputs": {k: [(e.op.op_name, e.index) for e in edges] for k, edges in info.input_ops.items()},
        "outputs": {k: (e.op.op_name, e.index) for k, e in info.output_ops.items()},
        "ops": {
            op.op_name: {
                "type": op.op_type,
                "stack": [(c.module_name, c.module_type) for c in op.module_stack],
                "frames": [(f.filename, f.lineno, f.function_name, f.code_context) for f in op.source_frames],
                "inputs": [(e.op_name, e.op_type, e.output_idx, e.is_state) for e in op.inputs],
                "outputs": {slot: [user.op_name for user in users] for slot, users in op.outputs.items()},
            }
            for op in info.ops
        },
    }


def dump(inspector: ModelInspector) -> dict[str, Any]:
    """All records, by module, and the tree as text, without its legend."""
    text = inspector.format_summary(colorize=False)
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("(")), 0)
    return {
        "modules": {name: _module(info) for name, info in inspector.summary.model.named_modules()},
        "text": [line.rstrip() for line in lines[start:]],
        "mode": str(inspector.summary.mode),
    }


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """The dump of each model in ``job["mode"]`` with each compressor that the mode has."""
    os.environ["COLUMNS"] = "300"
    answers: dict[str, Any] = {}
    for name, (build, inputs) in MODELS.items():
        for kind, compressor in COMPRESSORS.items():
            if kind == "palettizer" and job["mode"] == "graph":
                continue
            torch.manual_seed(0)
            answers[f"{name}-{kind}"] = dump(
                ModelInspector(build().eval(), inputs(), job["mode"], compressor)
            )
    return answers
