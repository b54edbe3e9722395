"""Batch norms behind convolutions in compiled training: the backward divides by what the forward did."""

import pytest
import torch
from torch import nn

from .support import prepared, x


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)),
    )


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_gradients_of_compiled_training_are_those_of_eager(backend: str) -> None:
    """The batch norms update the variances that the backward needs as they were."""
    torch._dynamo.reset()
    gradients = []
    for compiles in (False, True):
        quantizer, model = prepared(network(), x(3, 3, 8, 8))
        run = torch.compile(model, fullgraph=True, backend=backend) if compiles else model
        with quantizer.training_mode():
            for scale in (1.0, 3.0):
                run(x(3, 3, 8, 8) * scale).square().mean().backward()
        gradients.append({name: each.grad for name, each in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)
