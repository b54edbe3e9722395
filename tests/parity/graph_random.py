"""Random programs with random configurations: placement has rules for every pair of neighbours.

Public names only: the same file runs on both packages.
"""

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, QuantizerConfig
from coreai_opt.quantization.config.quantization_config import OpQuantizerConfig
from coreai_opt.quantization.spec import PerChannelGranularity

from .graph_probes import Probe

__all__ = ["SEEDS", "random_probe"]

SEEDS = range(40)
SHAPE = (2, 4, 4)

# Functions of the values so far that give another one, all of them of SHAPE.
UNARY: dict[str, Any] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softmax": lambda t: torch.softmax(t, -1),
    "hardtanh": lambda t: F.hardtanh(t, -2.0, 2.0),
    "softplus": F.softplus,
    "transpose": lambda t: t.transpose(1, 2),
    "permute": lambda t: t.permute(0, 2, 1),
    "reshape": lambda t: t.reshape(4, 2, 4).view(2, 4, 4),
    "unsqueeze": lambda t: t.unsqueeze(1).squeeze(1),
    "dropout": lambda t: F.dropout(t, 0.5, False),
    "flatten": lambda t: t.flatten(1).view(2, 4, 4),
    "pool": lambda t: F.max_pool1d(t, 1),
    "mean": lambda t: t.mean(-1, keepdim=True).expand(2, 4, 4),
    "slice": lambda t: torch.cat([t[:, :2], t[:, 2:]], 1),
    "scale": lambda t: t * 0.5,
    "norm": lambda t: F.layer_norm(t, (4,)),
    "clone": lambda t: t.clone(),
}
BINARY: dict[str, Any] = {
    "add": torch.add,
    "plus": lambda a, b: a + b,
    "mul": torch.mul,
    "sub": torch.sub,
    "matmul": torch.matmul,
    "cat": lambda a, b: torch.cat([a, b], 2)[:, :, 2:6],
    "wide": lambda a, b: torch.cat([a, b], 1).view(2, 2, 4, 4).select(1, 0),
}


class Program(nn.Module):
    """Steps, each of which reads earlier values."""

    def __init__(self, choose: random.Random, length: int) -> None:
        super().__init__()
        self.steps: list[tuple[str, tuple[int, ...]]] = []
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.weight = nn.Parameter(torch.randn(4))
        for count in range(1, length + 1):
            kind = choose.choice(["layer", "layer", "unary", "unary", "binary", "weight"])
            near = [max(0, count - 1 - choose.choice([0, 0, 0, 1, 2])) for _ in range(2)]
            if kind == "layer":
                self.steps.append((str(choose.randrange(3)), (near[0],)))
            elif kind == "unary":
                self.steps.append((choose.choice(list(UNARY)), (near[0],)))
            elif kind == "binary":
                self.steps.append((choose.choice(list(BINARY)), (near[0], near[1])))
            else:
                self.steps.append(("weight", (near[0],)))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for name, sources in self.steps:
            given = [values[source] for source in sources]
            if name == "weight":
                values.append(given[0] * self.weight)
            elif name.isdigit():
                values.append(self.layers[int(name)](given[0]))
            else:
                values.append((UNARY | BINARY)[name](*given))
        return values[-1]


SPECS = (
    {},
    {"qscheme": "asymmetric"},
    {"dtype": "uint8", "qscheme": "asymmetric"},
    {"dtype": "int4"},
    {"float_range": [-1, 1]},
    {"qparam_calculator_cls": "global_minmax"},
    {"granularity": PerChannelGranularity(axis=-1)},
)
OP_TYPES = ("linear", "add", "mul", "matmul", "cat", "relu", "flatten", "max_pool1d", "mean", "sub")


def specs(choose: random.Random, keys: tuple[Any, ...]) -> dict[Any, Any] | None:
    kind = choose.random()
    if kind < 0.12:
        return None
    if kind < 0.2:
        return {}
    spec = QuantizationSpec(**choose.choice(SPECS))  # type: ignore[arg-type]
    return {choose.choice(keys): spec}


def fields(choose: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if choose.random() < 0.6:
        found["op_input_spec"] = specs(choose, ("*", "*", 0))
    if choose.random() < 0.6:
        found["op_output_spec"] = specs(choose, ("*", 0))
    return found


def entry(choose: random.Random, boundary: bool = True) -> ModuleQuantizerConfig | None:
    if choose.random() < 0.12:
        return None
    found = fields(choose)
    if choose.random() < 0.3:
        op = None if choose.random() < 0.4 else OpQuantizerConfig(**fields(choose))
        found["op_type_config"] = {choose.choice(OP_TYPES): op}
    if choose.random() < 0.3:
        op = None if choose.random() < 0.4 else OpQuantizerConfig(**fields(choose))
        found["op_name_config"] = {choose.choice(["linear", "linear_1", "add.*", "mul", "cat", "matmul"]): op}
    if boundary and choose.random() < 0.25:
        given = QuantizationSpec(**choose.choice(SPECS[:6]))  # type: ignore[arg-type]
        found["module_input_spec"] = {choose.choice(["*", 0]): given}
    if boundary and choose.random() < 0.25:
        given = QuantizationSpec(**choose.choice(SPECS[:6]))  # type: ignore[arg-type]
        found["module_output_spec"] = {choose.choice(["*", 0]): given}
    return ModuleQuantizerConfig(**found)


def random_probe(seed: int) -> Probe:
    """The same for the same seed."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(Program(choose, choose.randint(2, 8)), Program(choose, choose.randint(2, 8)))
    config = QuantizerConfig(global_config=entry(choose, boundary=False))
    if choose.random() < 0.4:
        config.set_module_type(choose.choice([nn.Linear, Program]), entry(choose))
    for _ in range(choose.choice([0, 0, 1, 2])):
        name = choose.choice(["0", "1", r"\d", "0.layers.0", r".*layers\.1", "1.layers.2"])
        config.set_module_name(name, entry(choose))
    return model, (torch.randn(SHAPE),), config
