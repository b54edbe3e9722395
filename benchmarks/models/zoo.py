"""Models to train, each with a task: small enough for a test, or as large as a benchmark wants them.

Both contenders, and the parity tests, build them from this very file. Nothing here imports coreai_opt.
Dropouts have p = 0.5, and batch norms torch's own numbers: what Apple's graph mode gives them in any case.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.networks import (
    Autoencoder,
    Convolutions,
    Encoder,
    InvertedResidual,
    LSTMTagger,
    ResNet,
    Shared,
)

__all__ = ["MANY", "MODELS", "ONE", "Batch", "Task", "build"]

Batch = tuple[tuple[Tensor, ...], Tensor]


@dataclass(frozen=True)
class Task:
    """A model, where its batches come from, and its loss.

    Attributes:
        model: on the CPU, in training mode, float32.
        draw: from a generator to the positional inputs of a batch and its target.
        output: from what the model returns to the tensor that the loss takes.
        loss: from that tensor and the target to a scalar.
    """

    model: nn.Module
    draw: Callable[[torch.Generator], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    output: Callable[[Any], Tensor] = lambda returned: returned

    def batch_loss(self, batch: Batch) -> Tensor:
        """The loss of one batch."""
        inputs, target = batch
        return self.loss(self.output(self.model(*inputs)), target)


def _classification(*shape: int, classes: int = 10) -> Callable[[torch.Generator], Batch]:
    def draw(generator: torch.Generator) -> Batch:
        x = torch.randn(shape, generator=generator)
        return (x,), torch.randint(classes, shape[:1], generator=generator)

    return draw


def _regression(*shape: int) -> Callable[[torch.Generator], Batch]:
    def draw(generator: torch.Generator) -> Batch:
        x = torch.randn(shape, generator=generator)
        return (x,), x.sin()

    return draw


def _tokens(batch: int, length: int, vocabulary: int) -> Callable[[torch.Generator], Batch]:
    """Next-token prediction."""

    def draw(generator: torch.Generator) -> Batch:
        tokens = torch.randint(vocabulary, (batch, length + 1), generator=generator)
        return (tokens[:, :-1].contiguous(),), tokens[:, 1:].contiguous()

    return draw


def _token_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


def _mlp(large: bool) -> Task:
    width, batch = (512, 128) if large else (24, 6)
    model = nn.Sequential(
        *(nn.Linear(64, width), nn.ReLU(), nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()),
        *(nn.Dropout(0.5), nn.Linear(width, 10)),
    )
    return Task(model, _classification(batch, 64), F.cross_entropy)


def _resnet(large: bool) -> Task:
    model = ResNet(32, 4) if large else ResNet(8, 2)
    return Task(model, _classification(*((32, 3, 32, 32) if large else (3, 3, 8, 8))), F.cross_entropy)


def _depthwise(large: bool) -> Task:
    channels, blocks = (32, 4) if large else (8, 2)
    model = nn.Sequential(
        *(nn.Conv2d(3, channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels), nn.Hardswish()),
        *(InvertedResidual(channels) for _ in range(blocks)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)),
    )
    return Task(model, _classification(*((32, 3, 32, 32) if large else (3, 3, 8, 8))), F.cross_entropy)


def _transposed(large: bool) -> Task:
    shape = (16, 3, 64, 64) if large else (2, 3, 8, 8)
    return Task(Autoencoder(32 if large else 8), _regression(*shape), F.mse_loss)


def _lstm(large: bool) -> Task:
    vocabulary, width, batch, length = (256, 128, 32, 32) if large else (24, 8, 2, 5)
    return Task(LSTMTagger(vocabulary, width), _tokens(batch, length, vocabulary), _token_loss)


def _encoder(large: bool) -> Task:
    vocabulary, width, layers, batch, length = (256, 128, 3, 16, 64) if large else (24, 16, 1, 2, 5)
    return Task(Encoder(vocabulary, width, length, layers), _tokens(batch, length, vocabulary), _token_loss)


def _llama(large: bool) -> Task:
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, width, layers, batch, length = (512, 128, 3, 8, 64) if large else (32, 16, 2, 2, 5)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * length,
        use_cache=False,
    )
    draw = _tokens(batch, length, vocabulary)
    return Task(LlamaForCausalLM(config), draw, _token_loss, lambda returned: returned.logits)


def _vit(large: bool) -> Task:
    from transformers import ViTConfig, ViTForImageClassification

    width, layers, image, patch = (128, 3, 32, 4) if large else (16, 2, 8, 4)
    config = ViTConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=image,
        patch_size=patch,
        num_labels=10,
        hidden_dropout_prob=0.5,
    )
    draw = _classification(16 if large else 2, 3, image, image)
    return Task(ViTForImageClassification(config), draw, F.cross_entropy, lambda returned: returned.logits)


def _convolutions(large: bool) -> Task:
    shape = (8, 3, 16, 16) if large else (2, 3, 4, 4)
    return Task(Convolutions(16 if large else 4), _regression(*shape), F.mse_loss)


def _shared(large: bool) -> Task:
    vocabulary, width, batch, length = (256, 128, 16, 32) if large else (24, 8, 2, 5)
    return Task(Shared(vocabulary, width), _tokens(batch, length, vocabulary), _token_loss)


MODELS: dict[str, Callable[[bool], Task]] = {
    "mlp": _mlp,
    "cnn": _resnet,
    "depthwise": _depthwise,
    "transposed": _transposed,
    "lstm": _lstm,
    "encoder": _encoder,
    "llama": _llama,
    "vit": _vit,
    "convolutions": _convolutions,
    "shared": _shared,
}


MANY, ONE = "200 layers", "one layer"
_LAYERS, _WIDTH = 200, 64


def _many(_: bool) -> Task:
    model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(_LAYERS)))
    return Task(model, _regression(1, _WIDTH), F.mse_loss)


def _one(_: bool) -> Task:
    model = nn.Linear(_LAYERS * _WIDTH, _WIDTH, bias=False)
    draw = _classification(1, _LAYERS * _WIDTH, classes=_WIDTH)
    return Task(model, draw, F.cross_entropy)


# As many weights in many tensors as in one; not among the models, for they are no task worth comparing.
_SIZES: dict[str, Callable[[bool], Task]] = {MANY: _many, ONE: _one}


def build(name: str, *, large: bool = False, seed: int = 0) -> Task:
    """The task of that name, with the same weights for the same seed.

    Raises:
        KeyError: there is none.
    """
    torch.manual_seed(seed)
    return (MODELS | _SIZES)[name](large)
