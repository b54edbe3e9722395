"""An algorithm of one's own, in one file: weights of three values (Li and Liu, arXiv 1605.04711).

It is registered under a name, which configurations then know; it has statistics, resumes and exports as the
others do. Layers become ternary one after the other, one an epoch.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from common import run
from pydantic import Field
from torch import Tensor, nn

from coreai_opt.controllers import (
    AlgorithmConfig,
    AlgorithmStatistics,
    BaseCompressionAlgorithmBuilder,
    BaseCompressionAlgorithmController,
    BaseCompressionScheduler,
    CompressionStage,
    CompressionStatistics,
)
from coreai_opt.controllers.core.masks import bake, install, installed
from coreai_opt.controllers.core.owners import Owners


class TernaryConfig(AlgorithmConfig):
    """Keys of the configuration: the threshold relative to the mean magnitude of a weight."""

    algorithm: Literal["ternary_weights"]
    threshold: float = Field(default=0.7, gt=0)


class Ternary(nn.Module):
    """``a * sign(w)`` where ``|w|`` is above the threshold, 0 elsewhere; gradients pass straight through."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.on = False

    def forward(self, weight: Tensor) -> Tensor:
        if not self.on:
            return weight
        with torch.no_grad():
            magnitude = weight.abs()
            kept = magnitude > self.threshold * magnitude.mean()
            scale = (magnitude * kept).sum() / kept.sum().clamp(min=1)
            ternary = torch.where(kept, scale * weight.sign(), 0.0)
        return ternary + (weight - weight.detach())  # the latter is zero, with weight's gradient


@dataclass(frozen=True)
class TernaryLayer:
    """One weight."""

    name: str
    ternary: bool
    share_of_zeros: float


@AlgorithmStatistics.register("ternary_weights")
@dataclass(frozen=True)
class TernaryStatistics(AlgorithmStatistics):
    """Scalars become a table of two columns, records a table of their own."""

    ternary_layers: int
    layers: list[TernaryLayer] = field(default_factory=list)


class TernaryScheduler(BaseCompressionScheduler):
    """One more layer in each epoch."""

    def __init__(self, controller: "TernaryController") -> None:
        super().__init__()
        self.controller = controller

    def epoch_step(self, next: int | None = None) -> None:
        super().epoch_step(next)
        self.controller.switch_on(self.current_epoch + 1)


class TernaryController(BaseCompressionAlgorithmController):
    """The rate is the share of the layers that are ternary."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._links = installed(model, Ternary)
        self._scheduler = TernaryScheduler(self)

    def switch_on(self, count: int) -> None:
        for index, link in enumerate(self._links.values()):
            link.on = index < count

    def _count(self) -> int:
        return sum(link.on for link in self._links.values())

    def _get_compression_rate(self) -> float:
        return self._count() / len(self._links)

    def compression_stage(self) -> CompressionStage:
        if self._count() == len(self._links):
            return CompressionStage.FULLY_COMPRESSED
        return CompressionStage.PARTIALLY_COMPRESSED if self._count() else CompressionStage.UNCOMPRESSED

    def statistics(self, quickly_collected_only: bool = False) -> CompressionStatistics:
        layers = []
        for name, link in {} if quickly_collected_only else self._links.items():
            weight: Any = self._model.get_submodule(name).weight
            layers.append(TernaryLayer(name, link.on, float((weight == 0).float().mean())))
        return CompressionStatistics(ternary_weights=TernaryStatistics(self._count(), layers))

    def strip_model(self, model: nn.Module) -> None:
        bake(model, (Ternary,))

    # What is neither in the scheduler nor in the model's state_dict.
    def _get_algorithm_state(self) -> dict[str, Any]:
        return {"count": self._count()}

    def _load_algorithm_state(self, state: dict[str, Any]) -> None:
        self.switch_on(state["count"])


@BaseCompressionAlgorithmBuilder.register("ternary_weights")
class TernaryBuilder(BaseCompressionAlgorithmBuilder):
    """Puts a :class:`Ternary` on the weights of the layers in scope."""

    config_type = TernaryConfig

    def _apply_to(self, model: nn.Module) -> None:
        owners = Owners(model)  # a weight that layers share is made ternary in all of them
        for layer in self.layers(model).values():
            install(layer, Ternary(self.config.threshold), owners)

    def build_controller(self, model: nn.Module) -> TernaryController:
        return TernaryController(model)


ALGORITHMS = [{"algorithm": "ternary_weights", "ignored_scopes": ["stem", "classify"]}]

if __name__ == "__main__":
    run(*ALGORITHMS)
