"""A small model, prepared, for single calls of a quantizer."""

import torch
from torch import Tensor, nn

from coreai_opt.quantization import Quantizer, QuantizerConfig

from .quantizer_configs import eager
from .quantizer_runs import simulators

__all__ = ["Model", "X", "prepared", "switched"]

X = torch.ones(3, 4)


class Model(nn.Module):
    """Runs another number of additions when asked to, or fails."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(
        self, x: Tensor, additions: int = 2, fail: bool = False, scale: Tensor | None = None
    ) -> Tensor:
        x = self.layer(x)
        for _ in range(additions):
            x = x + x
        if fail:
            raise KeyError("fail")
        return x if scale is None else x * scale


def prepared(config: QuantizerConfig | None = None, model: nn.Module | None = None) -> Quantizer:
    quantizer = Quantizer(model or Model(), config or eager())
    quantizer.model = quantizer.prepare((X,))  # type: ignore[attr-defined]
    return quantizer


def switched(quantizer: Quantizer) -> tuple[tuple[bool, bool], ...]:
    return tuple(
        (bool(each.observer_enabled), bool(each.fake_quant_enabled))
        for each in simulators(quantizer.model).values()
    )
