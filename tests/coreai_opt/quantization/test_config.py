"""The configuration of quantizers."""

import pytest
from pydantic import ValidationError

from coreai_opt.quantization import (
    ExecutionMode,
    InvalidExecutionModeError,
    ModuleQuantizerConfig,
    QuantizationSpec,
    QuantizerConfig,
)
from coreai_opt.quantization.config import KVCacheQuantConfig, OpQuantizerConfig, QATSchedule
from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity

from .support import OFF


def cache_config(**kwargs):
    return KVCacheQuantConfig(
        op_quantizer_config=OpQuantizerConfig(**{"op_output_spec": None, "op_state_spec": None, **kwargs})
    )


def test_defaults() -> None:
    config = QuantizerConfig()
    assert config.execution_mode is ExecutionMode.GRAPH
    assert config.global_config == ModuleQuantizerConfig()
    assert config.global_config.op_state_spec["weight"].granularity == PerChannelGranularity(axis=0)


@pytest.mark.parametrize(
    ("preset", "dtype", "granularity"),
    [
        ("w4", "int4", PerChannelGranularity()),
        ("w8", "int8", PerChannelGranularity()),
        ("w4_per_block", "int4", PerBlockGranularity(block_size=32)),
    ],
)
def test_presets(preset, dtype, granularity) -> None:
    module = getattr(ModuleQuantizerConfig.presets, preset)()
    assert module.op_state_spec == {"weight": QuantizationSpec(dtype=dtype, granularity=granularity)}
    assert module.op_input_spec == module.op_output_spec == {"*": None}
    model = getattr(QuantizerConfig.presets, preset)(axis=1, execution_mode="eager")
    assert model.execution_mode is ExecutionMode.EAGER
    assert model.global_config.op_state_spec["weight"].granularity.axis == 1
    assert getattr(QuantizerConfig.presets, preset)().execution_mode is ExecutionMode.GRAPH


def test_dicts_and_yaml_go_round(tmp_path) -> None:
    config = QuantizerConfig.presets.w4_per_block(execution_mode="eager")
    config.set_module_name("head", None)
    config.set_module_type(
        "torch.nn.Conv2d",
        ModuleQuantizerConfig(
            op_type_config={"conv2d": OpQuantizerConfig(op_input_spec={0: QuantizationSpec(dtype="uint8")})},
            qat_schedule=QATSchedule(enable_observer=1, enable_fake_quant=2, disable_observer=3),
        ),
    )
    assert QuantizerConfig.from_dict(config.to_dict()) == config
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert QuantizerConfig.from_yaml(tmp_path / "config.yaml") == config


def test_a_file_with_anchors(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text(
        """
        quantization_spec:
          weight: &weight {dtype: int4, granularity: {type: per_block, block_size: 16}}
        quantization_config:
          execution_mode: eager
          global_config: {op_input_spec: null, op_output_spec: null, op_state_spec: {weight: *weight}}
          module_type_configs: {torch.nn.Linear: null}
        """
    )
    config = QuantizerConfig.from_yaml(tmp_path / "config.yaml")
    assert config.global_config.op_state_spec["weight"].granularity.block_size == 16
    assert config.execution_mode is ExecutionMode.EAGER


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("{global_confg: {}}", "global_config"),
        ("{global_config: {op_inputspec: null}}", "op_input_spec"),
        ("{global_config: {op_type_config: {linear: {op_state_specs: null}}}}", "op_state_spec"),
        ("{global_config: {qat_schedule: {enable_observers: 1}}}", "enable_observer"),
    ],
)
def test_unknown_keys_of_a_file_get_the_nearest_name(tmp_path, text, hint) -> None:
    (tmp_path / "config.yaml").write_text(f"quantization_config: {text}")
    with pytest.raises(ValidationError, match=f"Did you mean '{hint}'"):
        QuantizerConfig.from_yaml(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"enable_observer": -1}, "greater than or equal to 0"),
        ({"disable_observer": 0}, "greater than 0"),
        ({"enable_observer": 3}, r"enable_fake_quant \(0\) must not be before enable_observer \(3\)"),
        ({"enable_observer": 3, "enable_fake_quant": 3, "disable_observer": 3}, "must be after"),
        ({"enable_fake_quant": 5, "disable_observer": 3}, "must not be before enable_fake_quant"),
    ],
)
def test_schedules_in_the_wrong_order(fields, message) -> None:
    with pytest.raises(ValidationError, match=message):
        QATSchedule(**fields)


def test_schedules_are_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        QATSchedule().enable_observer = 3


def test_execution_modes() -> None:
    config = QuantizerConfig().set_execution_mode("eager")
    assert config.execution_mode is ExecutionMode.EAGER
    with pytest.raises(InvalidExecutionModeError, match="'graph' or 'eager'; got 'script'"):
        config.set_execution_mode("script")
    assert config.execution_mode is ExecutionMode.EAGER
    with pytest.raises(ValidationError, match="execution_mode"):
        QuantizerConfig(execution_mode="script")


def test_caches() -> None:
    cache = cache_config(op_input_spec={2: QuantizationSpec()})
    assert cache.quant_input_idx == 2
    assert QuantizerConfig(kv_cache_quant_configs={"k": cache}).kv_cache_quant_configs == {"k": cache}
    with pytest.raises(ValidationError, match="graph mode only"):
        QuantizerConfig(kv_cache_quant_configs={"k": cache}, execution_mode="eager")


def test_a_refused_execution_mode_leaves_the_configuration_as_it_was() -> None:
    config = QuantizerConfig(
        kv_cache_quant_configs={"k": cache_config(op_input_spec={2: QuantizationSpec()})}
    )
    with pytest.raises(ValidationError, match="graph mode only"):
        config.set_execution_mode("eager")
    assert config.execution_mode is ExecutionMode.GRAPH


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"one key.*got the keys \['\*'\]"),
        ({"op_input_spec": {0: QuantizationSpec(), 1: QuantizationSpec()}}, "one key"),
        ({"op_input_spec": {-1: QuantizationSpec()}}, "one key"),
        ({"op_input_spec": {1: None}}, "must be a QuantizationSpec"),
        ({"op_input_spec": {1: QuantizationSpec()}, "op_output_spec": {0: QuantizationSpec()}}, "op_output"),
    ],
)
def test_caches_that_are_refused(fields, message) -> None:
    with pytest.raises(ValidationError, match=message):
        cache_config(**fields)


def test_boundaries_cannot_be_global() -> None:
    with pytest.raises(ValidationError, match="module_input_spec"):
        QuantizerConfig(global_config=ModuleQuantizerConfig(**OFF, module_input_spec={0: QuantizationSpec()}))
