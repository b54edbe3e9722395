"""Inputs for one forward of a model of transformers, made from its configuration."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["example_inputs_of"]

# What the image's size is where a configuration has none: of fully convolutional models.
_IMAGE_SIZE = 224
# A second of sound at 16 kHz.
_SAMPLES = 16000


def example_inputs_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Text, images or sound of the shapes that the model takes, as keyword arguments.

    Args:
        model: says by ``main_input_name`` what it takes.

    Raises:
        ValueError: its inputs are of another kind.
    """
    config = model.config
    kind = model.main_input_name
    vision = getattr(config, "vision_config", None)
    made: dict[str, Tensor]
    if kind == "pixel_values":
        made = {"pixel_values": _image(config)}
    elif kind == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 500)
        made = {"input_features": _normal(1, config.num_mel_bins, frames)}
    elif kind == "input_values":
        made = {"input_values": _normal(1, _SAMPLES)}
    elif kind == "input_ids":
        tokens: Tensor = model.dummy_inputs["input_ids"]
        made = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        # Of models that compare texts with images: both.
        if vision is not None and hasattr(model, "vision_model"):
            made["pixel_values"] = _image(vision).expand(len(tokens), -1, -1, -1)
    else:
        raise ValueError(
            f"{type(model).__name__} takes {kind!r}, for which no example can be made: give inputs to "
            f"CompressionConfig"
        )
    if getattr(config, "is_encoder_decoder", False) and kind != "pixel_values":
        made["decoder_input_ids"] = torch.ones(len(next(iter(made.values()))), 3, dtype=torch.long)
    return {name: value.to(model.device) for name, value in made.items()}


def _image(config: Any) -> Tensor:
    size = getattr(config, "image_size", None) or _IMAGE_SIZE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return _normal(1, getattr(config, "num_channels", 3), height, width)


def _normal(*shape: int) -> Tensor:
    # As what images and sounds are scaled to.
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
