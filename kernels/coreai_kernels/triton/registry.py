"""Which operations have a Triton implementation; triton itself is imported at their first call."""

import importlib
from collections.abc import Callable
from typing import Any

__all__ = ["get"]

_MODULES = {
    "apply_mask": "masks",
    "block_mask": "masks",
    "choose_qparams": "qparams",
    "dequantize": "quantize",
    "fake_quantize_backward": "fake_quantize",
    "fake_quantize_backward_": "fake_quantize",
    "fake_quantize_by_reciprocal_": "by_reciprocal",
    "fake_quantize_by_reciprocal_backward": "by_reciprocal",
    "fake_quantize_forward": "fake_quantize",
    "foreach_fake_quantize_backward": "foreach",
    "foreach_fake_quantize_backward_": "foreach",
    "foreach_fake_quantize_forward": "foreach",
    "foreach_observe_and_fake_quantize_": "foreach",
    "gptq_columns": "gptq_columns",
    "learnable_range_backward": "learnable_range",
    "lloyd": "lloyd",
    "lookup": "palettes",
    "lookup_backward": "palettes",
    "lookup_packed": "palettes",
    "nm_mask": "masks",
    "observe_and_fake_quantize": "observe_and_fake_quantize",
    "observe_and_fake_quantize_": "observe_and_fake_quantize",
    "observe_range": "observe_range",
    "pack_bits": "bits",
    "palettize": "palettes",
    "quantize": "quantize",
    "sampled_mask_backward": "sampled_mask",
    "sampled_mask_forward": "sampled_mask",
    "soft_centroids": "soft_palettize",
    "soft_centroids_backward": "soft_palettize",
    "soft_palettize": "soft_palettize",
    "soft_palettize_backward": "soft_palettize",
    "top_blocks": "masks",
    "unpack_bits": "bits",
}


def get(name: str) -> Callable[..., Any] | None:
    """The Triton implementation of operator ``name``, if there is one."""
    module = _MODULES.get(name)
    if module is None:
        return None

    found: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal found
        if found is None:
            found = getattr(importlib.import_module(f"coreai_kernels.triton.{module}"), name)
        return found(*args)

    return call
