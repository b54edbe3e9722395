"""The axis of a weight's granularity where the specification leaves it open."""

from torch import nn

from coreai_opt.quantization.spec import (
    PerBlockGranularity,
    PerChannelGranularity,
    QuantizationGranularity,
    QuantizationSpec,
)

__all__ = ["has_open_axis", "with_default_axis"]

_OUTPUT_FIRST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
_INPUT_FIRST = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def has_open_axis(granularity: QuantizationGranularity) -> bool:
    """Whether the granularity needs an axis and has none."""
    if isinstance(granularity, PerBlockGranularity):
        return granularity.axis is None and isinstance(granularity.block_size, int)
    return isinstance(granularity, PerChannelGranularity) and granularity.axis is None


def with_default_axis(spec: QuantizationSpec, owner: nn.Module, name: str) -> QuantizationSpec:
    """The specification with the axis that suits the module's weight.

    One scale for each output channel, blocks along the input channels: axes 0 and 1 of linear layers,
    convolutions and embeddings; 1 and 0 of transposed convolutions. What has an axis stays as it is, and so
    does what has no default: :func:`has_open_axis` tells.

    Args:
        spec: the specification.
        owner: the module that holds the parameter.
        name: the parameter's name.
    """
    granularity = spec.granularity
    if name != "weight" or not has_open_axis(granularity):
        return spec
    is_block = isinstance(granularity, PerBlockGranularity)
    if isinstance(owner, _OUTPUT_FIRST):
        axis = 1 if is_block else 0
    elif isinstance(owner, _INPUT_FIRST):
        axis = 0 if is_block else 1
    else:
        return spec
    return spec.model_copy(update={"granularity": granularity.model_copy(update={"axis": axis})})
