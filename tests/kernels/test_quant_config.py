"""One set of settings: as fields, as arguments of operators, and packed."""

from dataclasses import fields

import pytest
import torch

from coreai_kernels import QuantConfig, RangeUpdate, ScaleFormat, Scheme

CONFIGS = [
    QuantConfig((1, 32), int(Scheme.ASYMMETRIC), 0, -8.0, 7.0, use_minval=True, range_min=-1.5),
    QuantConfig((), 0, 3, -6.0, 6.0, update=int(RangeUpdate.GLOBAL_MINMAX), range_max=0.0),
    QuantConfig((2, 3, 4), 0, 1, -448.0, 448.0, averaging_constant=0.1, scale_format=int(ScaleFormat.E4M3)),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_packed_and_back(config: QuantConfig) -> None:
    assert QuantConfig.unpacked(config.packed()) == config


@pytest.mark.parametrize("config", CONFIGS)
def test_arguments_are_the_fields_in_order(config: QuantConfig) -> None:
    assert config.arguments() == tuple(getattr(config, field.name) for field in fields(config))
    assert QuantConfig(*config.arguments()) == config
    names = [argument.split()[-1] for argument in QuantConfig.SCHEMA.split(",")]
    assert names == [field.name for field in fields(config)]


def test_other_blocks() -> None:
    (config, *_) = CONFIGS
    assert config.with_block_size((4, 4)) != config
    assert config.with_block_size((4, 4)).with_block_size((1, 32)) == config


def test_native_operators_refuse_settings_of_another_length() -> None:
    x, scale = torch.randn(2, 32), torch.ones(2, 1)
    packed = CONFIGS[0].packed()[:-1]
    with pytest.raises((RuntimeError, ValueError), match=r"config must be|rank|block_size"):
        torch.ops.coreai_kernels.observe_and_fake_quantize_(
            x, scale, None, None, None, None, False, packed, False
        )
