"""Networks of all kinds, small, for training in graph mode. Nothing here imports coreai_opt."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Bert",
    "Buffers",
    "EncoderDecoder",
    "Functional",
    "GRUHead",
    "Inverted",
    "LSTMHead",
    "Llama",
    "MixtureOfExperts",
    "Residual",
    "Separable",
    "SharedLayers",
    "TiedLanguageModel",
    "Transposed",
    "UNet",
    "ViT",
]


def conv(inputs: int, outputs: int, kernel: int = 3, groups: int = 1, stride: int = 1) -> nn.Sequential:
    padding = kernel // 2
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = conv(inputs, outputs, stride=stride), conv(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else conv(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.skip(x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(2))
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


class Inverted(nn.Module):
    """As in MobileNet v2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, stride=2), nn.ReLU6())
        self.expand = nn.Sequential(conv(8, 16, 1), nn.ReLU6())
        self.depth = nn.Sequential(conv(16, 16, groups=16), nn.ReLU6())
        self.project = conv(16, 8, 1)
        self.dropout, self.fc = nn.Dropout(0.5), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depth(self.expand(x)))
        return self.fc(self.dropout(x.mean([2, 3])))


class Separable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 6), (6, 8)):
            layers += [
                conv(inputs, inputs, groups=inputs),
                nn.ReLU6(),
                conv(inputs, outputs, 1),
                nn.Hardswish(),
            ]
        self.layers, self.fc = nn.Sequential(*layers), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.layers(x), 1).flatten(1))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(6, 32)
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(8, 6, 4, 2, 1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 3, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.start(x).view(-1, 8, 2, 2))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(conv(1, 4), nn.ReLU())
        self.down2 = nn.Sequential(conv(4, 8), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.out = nn.Sequential(conv(8, 4), nn.LeakyReLU(0.1), nn.Conv2d(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        wide = F.interpolate(second, scale_factor=2.0, mode="nearest")
        return torch.sigmoid(self.out(torch.cat([self.up(second) + wide[:, :4], first], 1)))


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, w = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1)) * (w // self.heads) ** -0.5
        if mask is not None:
            weights = weights + mask
        return self.out((weights.softmax(-1) @ v).transpose(1, 2).reshape(b, n, w))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention = SelfAttention(width, heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.5), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.norm_first:
            x = x + self.attention(self.norm1(x), mask)
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.mlp(x))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.layers = nn.Sequential(Layer(8, 2, True), Layer(8, 2, True))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.layers(x))[:, 0])


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.norm, self.layer = nn.LayerNorm(8), Layer(8, 2, False)
        self.pooler, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
        self.register_buffer("ids", torch.arange(6), persistent=False)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.words(tokens) + self.positions(self.ids[: tokens.shape[1]]))
        x = self.layer(x, (1.0 - mask[:, None, None, :]) * -10000.0)
        return self.head(torch.tanh(self.pooler(x[:, 0])))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.norm1, self.norm2, self.norm3 = (
            nn.Embedding(13, 8),
            RMSNorm(8),
            RMSNorm(8),
            nn.RMSNorm(8),
        )
        self.q, self.k, self.v, self.o = (nn.Linear(8, n, bias=False) for n in (8, 4, 4, 8))
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 13, bias=False)
        angles = torch.outer(torch.arange(5.0), 1.0 / (10.0 ** torch.arange(0, 1, 0.5)))
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin())

    def rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens)
        b, n, _ = x.shape
        y = self.norm1(x)
        q = self.rotate(self.q(y).view(b, n, 2, 4).transpose(1, 2))
        k = self.rotate(self.k(y).view(b, n, 1, 4).transpose(1, 2)).repeat_interleave(2, 1)
        v = self.v(y).view(b, n, 1, 4).transpose(1, 2).repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, n, 8))
        y = self.norm2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.norm3(x))


class EncoderDecoder(nn.Module):
    """As Whisper: convolutions over a spectrogram, an encoder, and a decoder that attends to it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(4, 8, 3, padding=1), nn.Conv1d(8, 8, 3, 2, 1)
        self.encoder, self.norm = Layer(8, 2, True), nn.LayerNorm(8)
        self.emb, self.decoder = nn.Embedding(9, 8), Layer(8, 2, True)
        self.cross, self.final = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)

    def forward(self, audio: Tensor, tokens: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(audio)))).permute(0, 2, 1)
        x = self.norm(self.encoder(x))
        y = self.decoder(self.emb(tokens))
        y = y + self.cross(y, x, x, need_weights=False)[0]
        return self.final(y) @ self.emb.weight.t()


class MixtureOfExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        shares = F.softmax(self.router(x), -1)
        best, chosen = shares.topk(2, -1)
        kept = torch.zeros_like(shares).scatter(-1, chosen, best)
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return x + (kept.unsqueeze(-1) * outputs).sum(1)


class GRUHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.fc = nn.GRU(3, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.gru(x)[0][:, -1]))


class LSTMHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(3, 6, bidirectional=True), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0].mean(0))


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.fc, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc(self.emb(tokens))))


class SharedLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 5)
        self.again = self.fc
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.again(F.relu(self.fc(self.fc(x))))))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(3, 6))
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x * self.weight, self.w1)
        y = F.relu(y) - y.sigmoid() * 0.5
        return torch.einsum("bi,oi->bo", y, self.w2) / 2


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(6, 4))
        self.register_buffer("offset", torch.randn(6))
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(x @ self.weight.t() + self.offset))
