import pytest
import torch

from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization.spec import QuantizationComponentFactory, QuantizationSpec


def construct(target=CompressionTargetTensor.WEIGHT, **fields):
    return QuantizationComponentFactory.construct(QuantizationSpec(**fields), target)


@pytest.fixture
def make():
    """Builds a fake quantizer from the fields of a specification."""
    return construct


@pytest.fixture
def make_activation():
    def make(**fields):
        return construct(CompressionTargetTensor.ACTIVATION, **fields)

    return make


@pytest.fixture
def x():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def registration():
    """Registers a class for the duration of a test."""
    entered = []

    def register(base, key):
        entered.append((base, key))
        return base.register(key)

    yield register
    for base, key in entered:
        base.REGISTRY.pop(key, None)
