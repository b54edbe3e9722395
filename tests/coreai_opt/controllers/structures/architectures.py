"""Small networks of many architectures."""

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def block(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: type = nn.ReLU
) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), act())


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            block(inputs, width, 1), block(width, width, 3, stride), block(width, outputs, 1, act=nn.Identity)
        )
        self.down = (
            None if stride == 1 and inputs == outputs else block(inputs, outputs, 1, stride, act=nn.Identity)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + (x if self.down is None else self.down(x)), inplace=True)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, gate: type = nn.Sigmoid) -> None:
        super().__init__()
        self.reduce, self.expand, self.gate = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1), gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))


class Inverted(nn.Module):
    """MobileNet's and EfficientNet's block."""

    def __init__(self, inputs: int, width: int, outputs: int, act: type, squeeze: type | None = None) -> None:
        super().__init__()
        layers = [block(inputs, width, 1, act=act), block(width, width, 3, groups=width, act=act)]
        if squeeze is not None:
            layers.append(SqueezeExcite(width, squeeze))  # type: ignore[arg-type]
        self.body = nn.Sequential(*layers, block(width, outputs, 1, act=nn.Identity))
        self.adds = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def classifier(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def resnet() -> nn.Module:
    stem = [block(3, 16, 7, 2), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(
        *stem, Bottleneck(16, 16, 32), Bottleneck(32, 16, 32), Bottleneck(32, 16, 48, 2), classifier(48)
    )


def mobilenet_v2() -> nn.Module:
    act = nn.ReLU6
    return nn.Sequential(
        block(3, 16, act=act),
        Inverted(16, 48, 16, act),
        Inverted(16, 48, 24, act),
        Inverted(24, 48, 24, act),
        block(24, 32, 1, act=act),
        nn.Dropout(0.2),
        classifier(32),
    )


def mobilenet_v3() -> nn.Module:
    act = nn.Hardswish
    return nn.Sequential(
        block(3, 16, act=act),
        Inverted(16, 48, 16, act, nn.Hardsigmoid),
        Inverted(16, 32, 24, nn.ReLU),
        block(24, 32, 1, act=act),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(32, 24, 1),
        nn.Hardswish(),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


def efficientnet() -> nn.Module:
    act = nn.SiLU
    return nn.Sequential(
        block(3, 16, act=act),
        Inverted(16, 48, 16, act, nn.Sigmoid),
        Inverted(16, 48, 24, act, nn.Sigmoid),
        block(24, 32, 1, act=act),
        classifier(32),
    )


class DenseLayer(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 32, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(32), nn.Conv2d(32, 16, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, y], 1)


def densenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        DenseLayer(16),
        DenseLayer(32),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.Conv2d(48, 16, 1),
        nn.AvgPool2d(2),
        DenseLayer(16),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        classifier(32),
    )


class Shuffle(nn.Module):
    """ShuffleNetV2's block: half of the channels pass by, then halves are mixed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            block(half, 16, 1), block(16, 16, 3, groups=16, act=nn.Identity), block(16, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        y = torch.cat([a, self.branch(b)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shufflenet() -> nn.Module:
    return nn.Sequential(block(3, 32), Shuffle(32), Shuffle(32), classifier(32))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = block(3, 16), block(16, 24), block(24, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 24, 2, 2), nn.ConvTranspose2d(24, 16, 2, 2)
        self.merge2, self.merge1 = block(48, 24), block(32, 16)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.up2(self.bottom(F.max_pool2d(b, 2)))
        b = self.up1(self.merge2(torch.cat([c, b], 1)))
        return self.head(self.merge1(torch.cat([b, a], 1)))


class FPN(nn.Module):
    """Two levels, one head for both."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = block(3, 16), block(16, 32, stride=2)
        self.l1, self.l2 = nn.Conv2d(16, 24, 1), nn.Conv2d(32, 24, 1)
        self.tower, self.predict = nn.Conv2d(24, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        a = self.c1(x)
        b = self.c2(a)
        top = self.l2(b)
        bottom = self.l1(a) + F.interpolate(top, scale_factor=2.0, mode="nearest")
        return [self.predict(F.relu(self.tower(each))) for each in (bottom, top)]


class UnsharedHeads(nn.Module):
    """Two convolutions of different channels into one shared head."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)
        self.head, self.predict = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.predict(torch.relu(self.head(self.left(x).relu()))) + self.predict(
            torch.relu(self.head(self.right(x).relu()))
        )


class Recurrent(nn.Module):
    """A layer that runs on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.head = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Conv2d(16, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = F.relu(self.again(x))
        return self.head(x)


class TiedConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (
            nn.Conv2d(3, 16, 1),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1),
        )
        self.b.weight = self.a.weight
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(F.relu(self.a(x)) + F.relu(self.b(x)))


class Functional(nn.Module):
    """Layers whose parameters functions use."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1)
        self.free = nn.Parameter(torch.randn(8, 16, 1, 1))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.a.weight, self.a.bias))
        x = self.c(F.relu(F.conv2d(x, self.b.weight, self.b.bias, stride=2)))
        x = F.conv2d(x.relu(), self.free)
        return F.linear(x.mean((2, 3)), self.head.weight, self.head.bias)


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 24, 3, 2),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.ConvTranspose2d(24, 24, 3, 2, groups=24),
        nn.ReLU6(),
        nn.ConvTranspose2d(24, 3, 1),
    )


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=4),
        nn.ReLU(),
        nn.Conv2d(16, 24, 1),
        nn.ReLU(),
        nn.Conv2d(24, 48, 3, groups=24),
        nn.ReLU(),
        nn.Conv2d(48, 4, 1),
    )


def one_dimensional() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 16, 3),
        nn.BatchNorm1d(16),
        nn.PReLU(16),
        nn.Conv1d(16, 24, 3, stride=2),
        nn.ELU(),
        nn.ConvTranspose1d(24, 16, 3),
        nn.Tanh(),
        nn.AdaptiveAvgPool1d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def three_dimensional() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(3, 16, 3, padding=1),
        nn.BatchNorm3d(16),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(16, 24, 3, padding=1),
        nn.InstanceNorm3d(24, affine=True),
        nn.LeakyReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(24, 4),
    )


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm, self.expand = nn.LayerNorm(channels), nn.Linear(channels, 2 * channels)
        self.contract, self.scale = nn.Linear(2 * channels, channels), nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.contract(F.gelu(self.expand(y)))).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 2, 2), ConvNeXtBlock(16), nn.Conv2d(16, 24, 2, 2), ConvNeXtBlock(24), classifier(24)
    )


def normalized() -> nn.Module:
    """Norms of all kinds, pixel operations, pads."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.GroupNorm(16, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
        nn.InstanceNorm2d(32),
        nn.ReLU(),
        nn.ReflectionPad2d(1),
        nn.Conv2d(32, 64, 3),
        nn.PixelShuffle(2),
        nn.Hardtanh(),
        nn.ZeroPad2d(1),
        nn.Conv2d(16, 24, 3),
        nn.GroupNorm(4, 24),
        nn.ReLU(),
        nn.Conv2d(24, 16, 1),
        nn.PReLU(),
        nn.Conv2d(16, 2, 1),
    )


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(OrderedDict(a=nn.Conv2d(3, 16, 3), b=nn.ReLU(), c=nn.Conv2d(16, 24, 3)))
        self.head = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.tower(x), self.tower(x.flip(3))
        return self.head((a - b).abs().mean((2, 3)))


class RecurrentHead(nn.Module):
    """Convolutions whose maps a GRU and an LSTM read as sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
        self.gru, self.lstm = nn.GRU(16, 8, batch_first=True), nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).flatten(2).transpose(1, 2)
        return self.head(self.lstm(self.gru(x)[0])[0][:, -1])


class MambaLike(nn.Module):
    """A gated convolution over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Conv1d(3, 16, 1), nn.Linear(16, 64)
        self.conv, self.output = nn.Conv1d(32, 32, 3, padding=2, groups=32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(1, 2)
        a, gate = self.inner(x).chunk(2, dim=-1)
        a = self.conv(a.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return self.output(F.silu(a) * F.silu(gate)).mean(1)


class PatchTransformer(nn.Module):
    """A small ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 4, 4))
        self.position = nn.Parameter(torch.zeros(1, 16, 16))
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2) + self.position).mean(1))


class MeanOverChannels(nn.Module):
    """An axis of the same extent takes the place of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean(1))


IMAGE, LONG, VOLUME = (2, 3, 16, 16), (2, 3, 20), (2, 3, 6, 6, 6)
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    # how to make it, its input, whether something can be pruned
    "resnet": (resnet, (2, 3, 32, 32), True),
    "mobilenet_v2": (mobilenet_v2, IMAGE, True),
    "mobilenet_v3": (mobilenet_v3, IMAGE, True),
    "efficientnet": (efficientnet, IMAGE, True),
    "densenet": (densenet, IMAGE, True),
    "shufflenet": (shufflenet, IMAGE, True),
    "unet": (UNet, IMAGE, True),
    "fpn": (FPN, IMAGE, True),
    "shared head": (UnsharedHeads, IMAGE, True),
    "recurrent": (Recurrent, IMAGE, True),
    "tied": (TiedConvolutions, IMAGE, True),
    "functional": (Functional, IMAGE, True),
    "transposed": (transposed, IMAGE, True),
    "grouped": (grouped, IMAGE, True),
    "1-D": (one_dimensional, LONG, True),
    "3-D": (three_dimensional, VOLUME, True),
    "convnext": (convnext, IMAGE, False),
    "normalized": (normalized, IMAGE, True),
    "siamese": (Siamese, IMAGE, True),
    "recurrent head": (RecurrentHead, IMAGE, True),
    "mamba": (MambaLike, LONG, True),
    "vit": (PatchTransformer, IMAGE, True),
    "mean over channels": (MeanOverChannels, IMAGE, False),
}


def make(name: str) -> nn.Module:
    """A network with norms that do something."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name][0]().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model
