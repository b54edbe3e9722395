"""Captured calls of CUDA tensors: without a GPU ``cuda_fast_path.py`` is run on two that are emulated."""

from pathlib import Path

import pytest
import torch

from coreai_kernels import native
from coreai_kernels.runtime import fast_path_counts
from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization.spec import (
    PerChannelGranularity,
    QuantizationComponentFactory,
    QuantizationSpec,
)
from tests.kernels.cuda_support import ROOT, pytest_on_emulated_gpu

pytestmark = [
    pytest.mark.skipif(
        native.missing is not None or native.autograd_missing is not None,
        reason=f"no fast path: {native.missing or native.autograd_missing}",
    ),
    pytest.mark.skipif(not (ROOT / "csrc/cuda").exists(), reason="needs the source tree"),
]


@pytest.mark.slow
def test_on_emulated_gpus(tmp_path: Path) -> None:
    pytest_on_emulated_gpu(Path(__file__).with_name("cuda_fast_path.py"), tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(native.cuda_missing is not None, reason=f"no kernels: {native.cuda_missing}")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu() -> None:
    spec = QuantizationSpec(dtype="int4", granularity=PerChannelGranularity(axis=0))
    module, twin = (
        QuantizationComponentFactory.create_fake_quantizer(spec, CompressionTargetTensor.WEIGHT)
        for _ in range(2)
    )
    module.cuda()
    inputs = [torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    x = torch.empty(64, 64, device="cuda")
    for values in inputs[:4]:
        before = fast_path_counts()["hits"]
        assert torch.equal(module(x.copy_(values)).cpu(), twin(values))
    assert fast_path_counts()["hits"] == before + 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    assert fast_path_counts()["hits"] == before + 2
    for values in inputs[4:]:
        x.copy_(values)
        graph.replay()
        assert torch.equal(y.cpu(), twin(values))
    assert torch.equal(module.qparams_calculator.scale.cpu(), twin.qparams_calculator.scale)
