"""Axes that a specification leaves open."""

import pytest
from torch import nn

from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, QuantizerConfig
from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity

from .support import only, prepared, simulators, x

OPEN = QuantizationSpec(granularity=PerChannelGranularity())


def weights(spec: QuantizationSpec) -> QuantizerConfig:
    return QuantizerConfig(global_config=only(op_state_spec={"weight": spec}))


@pytest.mark.parametrize(
    ("layer", "shape", "channels", "blocks"),
    [
        (nn.Linear(4, 6), (2, 4), (6, 1), (6, 2)),
        (nn.Conv2d(4, 6, 3), (1, 4, 5, 5), (6, 1, 1, 1), (6, 2, 1, 1)),
        (nn.ConvTranspose2d(4, 6, 3), (1, 4, 5, 5), (1, 6, 1, 1), (2, 6, 1, 1)),
    ],
)
def test_weights_have_a_default(
    layer: nn.Module, shape: tuple[int, ...], channels: tuple[int, ...], blocks: tuple[int, ...]
) -> None:
    _, found = prepared(layer, x(*shape), config=weights(OPEN))
    (quantizer,) = simulators(found).values()
    assert quantizer.qparams_calculator.scale.shape == channels
    _, found = prepared(
        layer, x(*shape), config=weights(QuantizationSpec(granularity=PerBlockGranularity(block_size=2)))
    )
    (quantizer,) = simulators(found).values()
    assert quantizer.qparams_calculator.scale.shape == blocks


def test_activations_have_none() -> None:
    config = QuantizerConfig(global_config=only(op_input_spec={"*": OPEN}))
    with pytest.raises(ValueError, match="no default for activations"):
        prepared(nn.Linear(4, 4), x(2, 4), config=config)


def test_states_of_other_operations_have_none() -> None:
    entry = ModuleQuantizerConfig(module_state_spec={"weight": OPEN})
    config = QuantizerConfig(module_type_configs={nn.LayerNorm: entry})
    with pytest.raises(ValueError, match="layer_norm"):
        prepared(nn.LayerNorm(4), x(2, 4), config=config)
