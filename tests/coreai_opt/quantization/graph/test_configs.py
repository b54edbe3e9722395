"""Which entry of a configuration holds for an operation."""

import re
from typing import Any

import pytest
from torch import nn

from coreai_opt._utils.config_utils import ConfigLevel
from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, QuantizerConfig
from coreai_opt.quantization._graph.configs import NodeConfig, NodeConfigs, SpecKind, check_keys
from coreai_opt.quantization._graph.export import export_model
from coreai_opt.quantization.config.quantization_config import OpQuantizerConfig

from .support import mlp, x


def found(config: QuantizerConfig, node: str = "linear_1") -> NodeConfig:
    model = nn.Sequential(mlp(), nn.Linear(3, 2))
    graph = export_model(model, (x(2, 4),)).graph
    (chosen,) = [each for each in graph.nodes if each.name == node]
    result = NodeConfigs(model, config).of(chosen)
    assert result is not None
    return result


def test_names_come_before_types_and_types_before_the_global_entry() -> None:
    config = QuantizerConfig()
    assert found(config).level is ConfigLevel.GLOBAL
    config.set_module_type(nn.Linear, ModuleQuantizerConfig())
    assert found(config).level is ConfigLevel.MODULE_TYPE
    config.set_module_name("0", ModuleQuantizerConfig())
    assert found(config).level is ConfigLevel.MODULE_NAME
    assert found(config, "linear_2").level is ConfigLevel.MODULE_TYPE


def test_later_entries_take_precedence() -> None:
    config = QuantizerConfig(module_name_configs={"0": ModuleQuantizerConfig(), "1": ModuleQuantizerConfig()})
    assert found(config, "linear_2").position < found(config, "linear").position


def test_operations_by_name_come_before_those_by_type() -> None:
    by_type, by_name = OpQuantizerConfig(op_input_spec=None), OpQuantizerConfig(op_output_spec=None)
    entry = ModuleQuantizerConfig(op_type_config={"linear": by_type}, op_name_config={r"linear_\d": by_name})
    config = QuantizerConfig(global_config=entry)
    assert found(config).kind is SpecKind.OP_NAME
    assert found(config, "linear").kind is SpecKind.OP_TYPE
    assert found(config, "relu").kind is SpecKind.DEFAULT
    assert found(config).specs == by_name


def test_a_pattern_that_is_no_regular_expression() -> None:
    with pytest.raises(ValueError, match=r"op_name_config\s+.*is not a valid regular expression"):
        ModuleQuantizerConfig(op_name_config={"(": None})
    with pytest.raises(re.error, match="regular expression"):
        QuantizerConfig(module_name_configs={"(": None})


@pytest.mark.parametrize(
    ("entry", "where"),
    [
        ({"op_input_spec": {"x": QuantizationSpec()}}, "op_input_spec"),
        ({"op_output_spec": {1: QuantizationSpec()}}, "op_output_spec"),
        ({"module_input_spec": {"x": QuantizationSpec()}}, "module_input_spec"),
        ({"op_type_config": {"add": OpQuantizerConfig(op_input_spec={"y": None})}}, "op_type_config"),
    ],
)
def test_tensors_are_named_by_position(entry: dict[str, Any], where: str) -> None:
    with pytest.raises(NotImplementedError, match=where):
        check_keys(QuantizerConfig(module_name_configs={"0": ModuleQuantizerConfig(**entry)}))
