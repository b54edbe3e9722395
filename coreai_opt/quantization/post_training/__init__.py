"""Post-training algorithms: they choose quantized weights by what layers are given to read.

:meth:`coreai_opt.quantization.Quantizer.calibrate` runs them on a prepared model.
"""

from coreai_opt.quantization.post_training.adaround import AdaRound
from coreai_opt.quantization.post_training.algorithm import PostTrainingAlgorithm
from coreai_opt.quantization.post_training.awq import AWQ
from coreai_opt.quantization.post_training.bias_correction import BiasCorrection
from coreai_opt.quantization.post_training.cross_layer_equalization import CrossLayerEqualization
from coreai_opt.quantization.post_training.gptq import GPTQ
from coreai_opt.quantization.post_training.smoothquant import SmoothQuant

__all__ = [
    "AWQ",
    "GPTQ",
    "AdaRound",
    "BiasCorrection",
    "CrossLayerEqualization",
    "PostTrainingAlgorithm",
    "SmoothQuant",
]
