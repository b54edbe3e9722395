"""Simulators on a GPU: what they find there is what they find on the CPU."""

import pytest
import torch

from coreai_opt.palettization.spec import PerGroupedChannelGranularity
from coreai_opt.quantization.spec import QuantizationSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GROUPS = PerGroupedChannelGranularity(axis=0, group_size=4)
SPECS = {
    "scalars": {},
    "groups": {"granularity": GROUPS},
    "scaled": {"enable_per_channel_scale": True},
    "quantized": {"lut_qspec": QuantizationSpec(), "granularity": GROUPS},
    "pruned": {"sparsity_detection_threshold": 0.1},
    "pruned groups": {"sparsity_detection_threshold": 0.1, "granularity": GROUPS},
    "few values": {"n_bits": 8},
}


def state_on(device, simulator, weight, fields):
    module = simulator(**({"n_bits": 2} | fields)).to(device)
    values = module(weight.to(device))
    return {"values": values} | module.state_dict()


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
def test_scalars_are_the_same_on_both(simulator, weight, fields):
    pruned = weight.masked_fill(weight.abs() < 0.5, 0)
    expected, found = (state_on(device, simulator, pruned, fields) for device in ("cpu", "cuda"))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.is_cuda
        assert torch.equal(value.cpu(), expected[name]), name


@pytest.mark.parametrize("threshold", [None, 0.1])
@pytest.mark.parametrize("strategy", ["default", "straight_through", "dkm"])
def test_vectors_train_on_a_gpu(simulator, weight, threshold, strategy):
    pruned = weight.masked_fill(weight.abs() < 0.5, 0).cuda().requires_grad_()
    module = simulator(
        n_bits=2,
        cluster_dim=2,
        sparsity_detection_threshold=threshold,
        training_strategy_spec={"type": strategy},
    ).cuda()
    values = module(pruned)
    if values.requires_grad:
        values.square().sum().backward()
        assert pruned.grad.isfinite().all()
    module.step(pruned.detach(), 1)
    again = module.eval()(pruned.detach())
    assert again.is_cuda
    assert threshold is None or not again[~module.sparsity.mask].any()
