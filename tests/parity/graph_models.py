"""The models that graph mode trains, each with its inputs. Nothing here imports coreai_opt."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import zoo

from . import graph_networks as networks

__all__ = ["MODELS"]

Draw = Callable[[torch.Generator], tuple[Tensor, ...]]
Model = Callable[[], tuple[nn.Module, Draw]]


def floats(*shape: int) -> Draw:
    return lambda generator: (torch.randn(shape, generator=generator),)


def tokens(high: int, *shape: int) -> Draw:
    return lambda generator: (torch.randint(high, shape, generator=generator),)


def both(first: Draw, second: Draw) -> Draw:
    return lambda generator: (*first(generator), *second(generator))


def mask(generator: torch.Generator) -> tuple[Tensor, ...]:
    return ((torch.rand(2, 6, generator=generator) > 0.3).float(),)


class WithSeed(nn.Module):
    """A model of tokens that draws the same random numbers whenever it is called.

    For one whose dropouts Apple's package does not switch off in evaluation, not even where it prepares.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Any:
        return self.model(torch.ops.parity_runs.seeded(tokens))


@torch.library.custom_op("parity_runs::seeded", mutates_args=())
def seeded(tokens: Tensor) -> Tensor:
    torch.manual_seed(3)
    return tokens.clone()


@seeded.register_fake
def _(tokens: Tensor) -> Tensor:
    return torch.empty_like(tokens)


class Once(nn.Module):
    """The zoo's model of shared weights, no weight of which is read both as it is and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.model = zoo.build("shared").model
        self.other = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        model: Any = self.model
        x = model.embedding(tokens)
        for _ in range(2):
            x = F.gelu(model.mixer(x))
        x = x + F.linear(x, model.weight) * model.gate
        x -= model.shift
        y = 2 * F.linear(x, self.other.weight.t()) - 1
        return model.head(y + y)


def network(make: Callable[[], nn.Module], draw: Draw) -> Model:
    return lambda: (make(), draw)


def of_zoo(name: str, around: Callable[[nn.Module], nn.Module] = lambda model: model) -> Model:
    def make() -> tuple[nn.Module, Draw]:
        task = zoo.build(name)
        return around(task.model), lambda generator: task.draw(generator)[0]

    return make


MODELS: dict[str, Model] = {
    "residual": network(networks.Residual, floats(2, 3, 12, 12)),
    "inverted": network(networks.Inverted, floats(2, 3, 12, 12)),
    "separable": network(networks.Separable, floats(2, 3, 8, 8)),
    "transposed": network(networks.Transposed, floats(2, 6)),
    "unet": network(networks.UNet, floats(2, 1, 8, 8)),
    "vit": network(networks.ViT, floats(2, 3, 8, 8)),
    "bert": network(networks.Bert, both(tokens(11, 2, 6), mask)),
    "llama": network(networks.Llama, tokens(13, 2, 5)),
    "encoder-decoder": network(networks.EncoderDecoder, both(floats(2, 4, 8), tokens(9, 2, 5))),
    "experts": network(networks.MixtureOfExperts, floats(4, 6)),
    "gru": network(networks.GRUHead, floats(2, 5, 3)),
    "lstm": network(networks.LSTMHead, floats(5, 2, 3)),
    "tied": network(networks.TiedLanguageModel, tokens(9, 2, 4)),
    "shared": network(networks.SharedLayers, floats(3, 5)),
    "functional": network(networks.Functional, floats(3, 4)),
    "buffers": network(networks.Buffers, floats(3, 4)),
    **{f"zoo {name}": of_zoo(name) for name in zoo.MODELS},
    "zoo encoder": of_zoo("encoder", WithSeed),
    "zoo shared, once": network(Once, tokens(24, 2, 5)),
}
