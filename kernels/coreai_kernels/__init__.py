"""Fused kernels for training compressed models: functions on tensors, on CPUs and GPUs.

Every function has a reference in plain torch, which defines its result; the native (C++) and Triton backends
give the same bits. See :func:`use_backend` to choose one.
"""

from coreai_kernels.backends import use_backend
from coreai_kernels.formats import Format, ScaleFormat
from coreai_kernels.ops.apply_mask import apply_mask
from coreai_kernels.ops.bits import pack_bits, unpack_bits
from coreai_kernels.ops.block_mask import block_mask, channel_mask
from coreai_kernels.ops.by_reciprocal import fake_quantize_by_reciprocal
from coreai_kernels.ops.fake_quantize import fake_quantize
from coreai_kernels.ops.foreach import foreach_fake_quantize, foreach_observe_and_fake_quantize
from coreai_kernels.ops.gptq_columns import gptq_columns
from coreai_kernels.ops.kmeans import kmeans, plain_kmeans
from coreai_kernels.ops.kmeans_1d import kmeans_1d
from coreai_kernels.ops.learnable_range import learnable_range
from coreai_kernels.ops.lookup import lookup, lookup_packed
from coreai_kernels.ops.nm_mask import nm_mask
from coreai_kernels.ops.observe_and_fake_quantize import observe_and_fake_quantize
from coreai_kernels.ops.observe_range import observe_range
from coreai_kernels.ops.palettize import palettize
from coreai_kernels.ops.qparams import choose_qparams
from coreai_kernels.ops.quantize import dequantize, quantize
from coreai_kernels.ops.sampled_mask import sampled_mask
from coreai_kernels.ops.soft_palettize import soft_centroids, soft_palettize
from coreai_kernels.ops.topk_mask import topk_mask, topk_masks
from coreai_kernels.quant_config import QuantConfig
from coreai_kernels.types import RangeUpdate, Scheme, grid_shape

__all__ = [
    "Format",
    "QuantConfig",
    "RangeUpdate",
    "ScaleFormat",
    "Scheme",
    "apply_mask",
    "block_mask",
    "channel_mask",
    "choose_qparams",
    "dequantize",
    "fake_quantize",
    "fake_quantize_by_reciprocal",
    "foreach_fake_quantize",
    "foreach_observe_and_fake_quantize",
    "gptq_columns",
    "grid_shape",
    "kmeans",
    "kmeans_1d",
    "lookup",
    "lookup_packed",
    "learnable_range",
    "nm_mask",
    "observe_and_fake_quantize",
    "observe_range",
    "pack_bits",
    "palettize",
    "plain_kmeans",
    "quantize",
    "sampled_mask",
    "soft_centroids",
    "soft_palettize",
    "topk_mask",
    "topk_masks",
    "unpack_bits",
    "use_backend",
]
