"""Training steps of every simulator, on CPU tensors that may do only what those of a Mac's GPU can."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import coreai_kernels as ck
from coreai_kernels import wide
from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.controllers.algorithms.learnable import LearnableRangeQuantize
from coreai_opt.controllers.algorithms.movement_masks import MovementMask
from coreai_opt.controllers.algorithms.rb_sparsity import RBSparsityMask
from coreai_opt.palettization import PalettizationSpec
from coreai_opt.palettization.kmeans.kmeans_fake_palettize import _KMeansFakePalettize
from coreai_opt.palettization.spec import DKMTrainingSpec, StraightThroughTrainingSpec
from coreai_opt.pruning.spec import (
    BlockStructured,
    ChannelStructured,
    NMStructured,
    PruneImplBase,
    Unstructured,
)
from coreai_opt.quantization.spec import (
    PerBlockGranularity,
    PerChannelGranularity,
    PerTensorGranularity,
    QuantizationComponentFactory,
    QuantizationSpec,
)
from tests.kernels.mps_rules import MpsRules

WEIGHT, ACTIVATION = CompressionTargetTensor.WEIGHT, CompressionTargetTensor.ACTIVATION
BLOCKS = PerBlockGranularity(axis=1, block_size=32)
Make = Callable[[Tensor], nn.Module]


def quantizer(target: CompressionTargetTensor = WEIGHT, **fields: object) -> Make:
    return lambda _: QuantizationComponentFactory.create_fake_quantizer(QuantizationSpec(**fields), target)


def pruner(scheme: object) -> Make:
    return lambda _: PruneImplBase.get_class("default")(0.5, scheme)


def palettizer(**fields: object) -> Make:
    def make(_: Tensor) -> nn.Module:
        return _KMeansFakePalettize(
            **PalettizationSpec(n_bits=2, **fields).model_dump_preserve_objects(),
            enable_fast_kmeans_mode=False,
            rounding_precision=4,
            sensitivities=None,
        )

    return make


def learnable(scheme: str) -> Make:
    def make(weight: Tensor) -> nn.Module:
        simulator = quantizer(qscheme=scheme, granularity=PerChannelGranularity(axis=0))(weight)
        simulator(weight)
        found = LearnableRangeQuantize(simulator, (weight.size(0), 1), weight.device)
        found.adopt(simulator)
        return found

    return make


SIMULATORS: dict[str, Make] = {
    "int8": quantizer(),
    "int4 in blocks": quantizer(dtype="int4", granularity=BLOCKS),
    "uint8 asymmetric": quantizer(dtype="uint8", qscheme="asymmetric"),
    "minimum and steps": quantizer(qscheme="asymmetric", qformulation="minval"),
    "fp8": quantizer(dtype="float8_e4m3fn", granularity=PerTensorGranularity()),
    "MXFP4": quantizer(dtype="float4_e2m1fn", granularity=BLOCKS, scale_dtype="float8_e8m0fnu"),
    "activations": quantizer(ACTIVATION, granularity=PerTensorGranularity()),
    "largest magnitudes": pruner(Unstructured()),
    "largest channels": pruner(ChannelStructured(axis=0)),
    "2:4": pruner(NMStructured(n=2, m=4, axis=1)),
    "largest blocks": pruner(BlockStructured(block_size=(4, 4))),
    "palettes": palettizer(),
    "palettes of vectors": palettizer(cluster_dim=2, enable_per_channel_scale=True),
    "palettes, straight through": palettizer(training_strategy_spec=StraightThroughTrainingSpec()),
    "palettes by attention": palettizer(training_strategy_spec=DKMTrainingSpec()),
    "learned range": learnable("symmetric"),
    "learned ends": learnable("asymmetric"),
    "random mask": lambda weight: RBSparsityMask(weight, seed=1),
    "movement mask": lambda weight: MovementMask(weight, (2, 2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", SIMULATORS)
def test_a_step(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator).to(dtype).requires_grad_()
    simulator = SIMULATORS[name](weight).train()
    with ck.use_backend("reference"):
        # The first call may cluster, which happens on the CPU.
        simulator(weight)
        monkeypatch.setattr(wide, "has_float64", lambda device: False)
        with MpsRules():
            output = simulator(weight)
            if output.requires_grad:  # by default, palettes are not trained
                output.backward(torch.ones_like(output))
    assert output.dtype == dtype
    assert bool(output.isfinite().all())
