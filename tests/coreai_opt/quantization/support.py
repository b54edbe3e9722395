"""Small models, and what a quantizer did to them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

# No simulators at operations.
OFF: dict[str, Any] = {"op_input_spec": None, "op_output_spec": None, "op_state_spec": None}
WEIGHTS_ONLY: dict[str, Any] = {"op_input_spec": None, "op_output_spec": None}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


class Residual(nn.Module):
    """Operations of the forward itself, beside those of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.linear(x)
        return 2 * x + x


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual()
        self.act = nn.ReLU()
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.inner(x))) - x


def eager(**kwargs: Any) -> QuantizerConfig:
    return QuantizerConfig(execution_mode="eager", **kwargs)


def globally(**kwargs: Any) -> QuantizerConfig:
    return eager(global_config=ModuleQuantizerConfig(**kwargs))


def prepared(model: nn.Module, *inputs: Any, config: QuantizerConfig | None = None) -> tuple[Quantizer, Any]:
    quantizer = Quantizer(model, eager() if config is None else config)
    return quantizer, quantizer.prepare(inputs)


def simulators(model: nn.Module) -> dict[str, FakeQuantizeImplBase]:
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, FakeQuantizeImplBase)
    }


def slots(model: nn.Module) -> set[str]:
    return set(simulators(model))


def flags(model: nn.Module) -> dict[str, tuple[bool, bool]]:
    """Of each simulator, whether it observes and whether it simulates."""
    return {
        name: (bool(each.observer_enabled), bool(each.fake_quant_enabled))
        for name, each in simulators(model).items()
    }


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What must be as before when a call has failed."""
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "training": [module.training for module in model.modules()],
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "hooks": [len(module._forward_hooks) for module in model.modules()],
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    states = before.pop("state"), after.pop("state")
    return (
        before == after
        and list(states[0]) == list(states[1])
        and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    )
