"""Models and what is seen of their quantizers."""

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, Quantizer, QuantizerConfig
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["Function", "asymmetric", "flags", "mlp", "only", "prepared", "simulators", "x"]


class Function(nn.Module):
    """A model whose forward is a function of the model and its inputs."""

    def __init__(self, function: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def asymmetric(dtype: str = "int8") -> QuantizationSpec:
    return QuantizationSpec(dtype=dtype, qscheme="asymmetric")


def only(**specs: Any) -> ModuleQuantizerConfig:
    """Nothing but what is given."""
    nothing = {"op_input_spec": None, "op_output_spec": None, "op_state_spec": None}
    return ModuleQuantizerConfig(**{**nothing, **specs})


def prepared(
    model: nn.Module, *inputs: torch.Tensor, config: QuantizerConfig | None = None, **options: Any
) -> tuple[Quantizer, GraphModule]:
    quantizer = Quantizer(model, config, **options)
    found = quantizer.prepare(inputs)
    assert isinstance(found, GraphModule)
    return quantizer, found


def simulators(model: nn.Module) -> dict[str, FakeQuantizeImplBase]:
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, FakeQuantizeImplBase)}


def flags(model: nn.Module) -> dict[str, tuple[bool, bool]]:
    """Of each quantizer: whether it observes, and whether it simulates."""
    found = simulators(model).items()
    return {name: (bool(each.observer_enabled), bool(each.fake_quant_enabled)) for name, each in found}
