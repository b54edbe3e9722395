"""The network and the data of ``digits_qat.py``: plain torch and scikit-learn, nothing about compression."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: images ``(N, 1, 8, 8)`` float32 in [0, 1], labels ``(N,)`` int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_data(seed: int) -> Digits:
    """1257 images to train on and 540 to test with, each digit in equal shares in both."""
    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(pixels, labels, test_size=0.3, stratify=labels, random_state=seed)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in split)
    return Digits(
        train_images=train_x.float().reshape(-1, 1, 8, 8) / 16,
        train_labels=train_y.long(),
        test_images=test_x.float().reshape(-1, 1, 8, 8) / 16,
        test_labels=test_y.long(),
    )


class TransformerBlock(nn.Module):
    """Self-attention and a two-layer perceptron, each added to its input of shape ``(N, tokens, width)``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.project = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        query, key, value = (self._split(layer(normed)) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.contract(F.gelu(self.expand(self.mlp_norm(x))))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class DigitsNet(nn.Module):
    """Two convolutions turn an image into 16 tokens; a transformer block and a linear layer classify them."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width // 2, kernel_size=3, padding=1)
        self.tokenize = nn.Conv2d(width // 2, width, kernel_size=3, stride=2, padding=1)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.block = TransformerBlock(width, heads=4)
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, 10)
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.tokenize(F.relu(self.stem(images))))
        tokens = features.flatten(2).transpose(1, 2) + self.position
        return self.classify(self.norm(self.block(tokens)).mean(dim=1))


def _initialize(module: nn.Module) -> None:
    """He's initialization for convolutions before a ReLU, a narrow normal one as in transformers."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
