"""The operations whose weights are palettized, and the modules that call them."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn import functional

__all__ = ["OP_TYPES", "SUPPORTED_MODULES", "TRANSPOSED_OPS"]

OP_TYPES: dict[Callable[..., Any], str] = {
    functional.conv1d: "conv1d",
    functional.conv2d: "conv2d",
    functional.conv3d: "conv3d",
    functional.conv_transpose1d: "conv_transpose1d",
    functional.conv_transpose2d: "conv_transpose2d",
    functional.conv_transpose3d: "conv_transpose3d",
    functional.linear: "linear",
    functional.multi_head_attention_forward: "multi_head_attention_forward",
}

# Operations whose weight has its output channels in axis 1.
TRANSPOSED_OPS = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")

SUPPORTED_MODULES: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.MultiheadAttention,
)
