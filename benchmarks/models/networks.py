"""Small networks of the usual kinds; `benchmarks.models.zoo` gives them their tasks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Autoencoder",
    "Convolutions",
    "Encoder",
    "InvertedResidual",
    "LSTMTagger",
    "ResNet",
    "Shared",
]


class Residual(nn.Module):
    """Two convolutions with batch norm, and a sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class ResNet(nn.Module):
    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(2)
        self.blocks = nn.ModuleList(Residual(channels) for _ in range(blocks))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm(self.stem(x))))
        for block in self.blocks:
            x = block(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class InvertedResidual(nn.Module):
    """Expand, filter each channel by itself, project."""

    def __init__(self, channels: int, expansion: int = 2) -> None:
        super().__init__()
        wide = channels * expansion
        self.layers = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Autoencoder(nn.Module):
    """Strided convolutions down, transposed ones up, with a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.up1 = nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1)
        self.up2 = nn.ConvTranspose2d(2 * channels, 3, 4, stride=2, padding=1, groups=1)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        skip = self.act(self.down1(x))
        y = self.act(self.up1(self.act(self.down2(skip))))
        return self.up2(torch.cat((y, skip), 1))


class LSTMTagger(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


class Attention(nn.Module):
    """Attention spelled out: matmul, scaling by a number, softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
        return self.out(torch.matmul(weights, v).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """A layer of torch's own encoder, one with attention spelled out, and learned positions."""

    def __init__(self, vocabulary: int, width: int, length: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.5, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.attention, self.norm = Attention(width, 4), nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(x + self.attention(self.norm(x)))


class Convolutions(nn.Module):
    """One- and three-dimensional convolutions, plain and transposed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, channels, 3, padding=1)
        self.up1 = nn.ConvTranspose1d(channels, channels, 2, 2)
        self.conv3 = nn.Conv3d(channels, channels, 3, padding=1)
        self.up3 = nn.ConvTranspose3d(channels, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.up1(torch.tanh(self.conv1(x.flatten(2)))))
        volume = y.reshape(x.shape[0], -1, 2, *x.shape[2:])
        return self.up3(torch.tanh(self.conv3(volume))).mean(2)[..., ::2, ::2]


class Shared(nn.Module):
    """Weights and modules used more than once, functional calls, a branch, a frozen parameter, a buffer."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mixer, self.unused = nn.Linear(width, width), nn.Linear(width, width)
        self.gate = nn.Parameter(torch.rand(width), requires_grad=False)
        self.weight = nn.Parameter(torch.randn(width, width) / width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("shift", torch.randn(width))

    def forward(self, tokens: Tensor, twice: bool = True) -> Tensor:
        x = self.embedding(tokens)
        for _ in range(2):
            x = F.gelu(self.mixer(x))
        if twice:
            x = x + F.linear(x, self.weight) * self.gate
        else:
            x = self.unused(x)
        x -= self.shift
        y = 2 * F.linear(x, self.mixer.weight.t()) - 1
        return self.head(y + y)
