"""Compresses the weights of a Core AI program, without the model that it came from."""

from coreai_opt.coreai_utils import _dependencies as _dependencies
from coreai_opt.coreai_utils.common import CompressionGranularity, DType, QScheme
from coreai_opt.coreai_utils.passes.weight_palettization import palettize_weights
from coreai_opt.coreai_utils.passes.weight_quantization import quantize_weights
from coreai_opt.coreai_utils.passes.weight_sparsification import sparsify_weights

__all__ = [
    "CompressionGranularity",
    "DType",
    "QScheme",
    "palettize_weights",
    "quantize_weights",
    "sparsify_weights",
]
