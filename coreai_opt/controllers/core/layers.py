"""The layers that are compressed, and where their weights have the output channels."""

from torch import nn

__all__ = ["CONVOLUTIONS", "INPUT", "OUTPUT", "TRANSPOSED", "WEIGHTED", "channel_axis_of"]

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
WEIGHTED: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, nn.Linear)
"""Layers whose weights are compressed unless an algorithm says otherwise."""

INPUT = "input_quantizer"
"""Name, in a layer, of what quantizes its input."""

OUTPUT = "output_quantizers"
"""Name, in a model, of what quantizes its outputs."""


def channel_axis_of(layer: nn.Module) -> int:
    """Axis of the output channels in the layer's weight."""
    return 1 if isinstance(layer, TRANSPOSED) else 0
