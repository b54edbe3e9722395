"""Small models, pruned under several configurations: prepared, trained, and taken up again."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .snapshots import freeze

__all__ = ["CONFIGS", "MODELS", "entry", "prepare", "resume", "run", "sparsities", "train"]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.fc = nn.Linear(100, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.up(F.relu(self.norm(self.conv(x))))).flatten(1))

    @staticmethod
    def inputs() -> tuple[Tensor, ...]:
        return (torch.randn(4, 2, 6, 6),)


class Attention(nn.Module):
    """Attention, shared weights, a function on a parameter, modules that are not pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Parameter(torch.randn(8, 8))
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.attend(x, x, x)[0])
        return self.head(self.mlp(F.linear(x, self.mix)))

    @staticmethod
    def inputs() -> tuple[Tensor, ...]:
        return (torch.randint(0, 11, (3, 5)),)


MODELS: dict[str, Any] = {"convolutions": Convolutions, "attention": Attention}


def entry(sparsity: float, *names: str, channels: int | None = None, **fields: Any) -> Any:
    """A module's configuration: one specification for some of its parameters, ``weight`` by default."""
    from coreai_opt.pruning import ModuleMagnitudePrunerConfig, PruningSpec
    from coreai_opt.pruning.spec import ChannelStructured

    scheme = {} if channels is None else {"pruning_scheme": ChannelStructured(axis=channels)}
    spec = PruningSpec(target_sparsity=sparsity, **scheme)
    return ModuleMagnitudePrunerConfig(op_state_spec=dict.fromkeys(names or ("weight",), spec), **fields)


def config(name: str) -> Any:
    from coreai_opt.pruning import MagnitudePrunerConfig, ModuleMagnitudePrunerConfig, PruningSpec
    from coreai_opt.pruning.config import ConstantSparsitySchedule, PolynomialDecaySchedule

    ramp = PolynomialDecaySchedule(total_iters=6, update_frequency=2, initial_sparsity=0.1)
    if name == "default":
        return None
    if name == "ramp":
        return MagnitudePrunerConfig(global_config=entry(0.8, "*", sparsity_schedule=ramp))
    if name == "channels":
        return MagnitudePrunerConfig(
            global_config=entry(0.5, channels=-1, sparsity_schedule=ConstantSparsitySchedule(begin_step=2))
        )
    if name == "levels":
        by_op = {"linear": {"op_state_spec": {"weight": PruningSpec(target_sparsity=0.9)}}}
        return MagnitudePrunerConfig(
            global_config=entry(0.25, op_type_config=by_op, op_name_config={r"mlp\.0\.linear": None}),
            module_type_configs={nn.Conv2d: entry(0.6), nn.MultiheadAttention: None},
            module_name_configs={
                "up|unused": None,
                "norm": entry(0.4, module_state_spec={"bias": PruningSpec()}),
            },
        )
    assert name == "nothing"
    return MagnitudePrunerConfig(
        global_config=None,
        module_type_configs={nn.Linear: ModuleMagnitudePrunerConfig(op_state_spec=None)},
    )


CONFIGS = ("default", "ramp", "channels", "levels", "nothing")


def prepare(model_name: str, config_name: str, seed: int = 0) -> tuple[nn.Module, Any, tuple[Tensor, ...]]:
    """A prepared model whose forward has no randomness and no ties, its pruner and an input."""
    from coreai_opt.pruning import MagnitudePruner

    torch.manual_seed(seed)
    model = MODELS[model_name]().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # zeros and ones, which would be ties
            nn.init.normal_(parameter)
    inputs = MODELS[model_name].inputs()
    pruner = MagnitudePruner(model, config(config_name))
    pruner.prepare(inputs)
    return model, pruner, inputs


def sparsities(model: nn.Module) -> dict[str, float]:
    return {
        f"{name}.{attribute}": chain[0].sparsity
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for attribute, chain in module.parametrizations.items()  # type: ignore[operator, union-attr]
    }


def train(model: nn.Module, pruner: Any, inputs: tuple[Tensor, ...], steps: int) -> list[Any]:
    """Losses, sparsities and the state after each of some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    log: list[Any] = []
    for _ in range(steps):
        loss = model(*inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
        log.append(freeze({"loss": loss, "sparsity": sparsities(model), "state": dict(model.state_dict())}))
    return log


def run(model_name: str, config_name: str) -> dict[str, Any]:
    model, pruner, inputs = prepare(model_name, config_name)
    state = freeze(dict(model.state_dict()))
    return {
        "prepared": {"sparsity": sparsities(model), "state": state, "output": model(*inputs)},
        "trained": train(model, pruner, inputs, 8),
        "parameters": [name for name, _ in model.named_parameters()],
    }


def resume(model_name: str, state: dict[str, Any]) -> Any:
    """Load ``state`` into a prepared model, strictly, and run it."""
    model, _, inputs = prepare(model_name, "default", seed=1)
    model.load_state_dict({key: value.tensor() for key, value in state.items()}, strict=True)
    return freeze({"state": dict(model.state_dict()), "output": model(*inputs)})
