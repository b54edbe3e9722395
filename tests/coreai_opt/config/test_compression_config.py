"""Configurations in three levels: what is filled in, which entry holds, what is refused, and round trips."""

import io
import re
import warnings

import pytest
from pydantic import ValidationError
from torch import nn

from coreai_opt._utils.config_utils import ConfigLevel, is_type_named
from coreai_opt.config import CompressionConfig
from coreai_opt.pruning import MagnitudePrunerConfig as Config
from coreai_opt.pruning import ModuleMagnitudePrunerConfig as ModuleConfig
from coreai_opt.pruning import PruningSpec
from coreai_opt.pruning.config import (
    ConstantSparsitySchedule,
    OpMagnitudePrunerConfig,
    PolynomialDecaySchedule,
)
from coreai_opt.pruning.spec import ChannelStructured
from coreai_opt.quantization import QuantizationSpec

KEY = "magnitude_pruning_config"


def entry(sparsity, **fields):
    return ModuleConfig(op_state_spec={"weight": PruningSpec(target_sparsity=sparsity)}, **fields)


class Special(nn.Linear):
    pass


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.special = Special(4, 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = Block()
        self.ab = Block()
        self.head = nn.Linear(4, 2)
        self.alias = self.head


def sparsities(config):
    """The sparsity that each module of Net gets, and the level that it comes from."""
    found = {}
    for level, entries in config.build_module_config_dict(Net()).items():
        for name, each in entries.items():
            spec = each.op_state_spec.get("weight")
            assert name not in found
            found[name] = (level.name, spec and spec.target_sparsity)
    return found


NAMES = ["", "a", "a.fc", "a.special", "ab", "ab.fc", "ab.special", "head"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"module_type_configs": {nn.Linear: entry(0.1)}}, {"a.fc ab.fc head": ("MODULE_TYPE", 0.1)}),
        ({"module_type_configs": {"torch.nn.Linear": entry(0.1)}}, {"a.fc ab.fc head": ("MODULE_TYPE", 0.1)}),
        ({"module_type_configs": {nn.Module: entry(0.1)}}, {}),
        (
            {"module_type_configs": {nn.Linear: entry(0.1), Block: entry(0.2)}},
            {"a ab a.fc ab.fc a.special ab.special": ("MODULE_TYPE", 0.2), "head": ("MODULE_TYPE", 0.1)},
        ),
        (
            {"module_type_configs": {Block: entry(0.2), nn.Linear: entry(0.1)}},
            {
                "a ab a.special ab.special": ("MODULE_TYPE", 0.2),
                "a.fc ab.fc head": ("MODULE_TYPE", 0.1),
            },
        ),
        ({"module_name_configs": {"a": entry(0.3)}}, {"a a.fc a.special": ("MODULE_NAME", 0.3)}),
        (
            {"module_name_configs": {"a": entry(0.3)}, "module_type_configs": {nn.Linear: entry(0.1)}},
            {"a a.fc a.special": ("MODULE_NAME", 0.3), "ab.fc head": ("MODULE_TYPE", 0.1)},
        ),
        (
            {"module_name_configs": {"a": entry(0.3), r".*\.fc": entry(0.4)}},
            {"a a.special": ("MODULE_NAME", 0.3), "a.fc ab.fc": ("MODULE_NAME", 0.4)},
        ),
        (
            {"module_name_configs": {r".*\.fc": entry(0.4), "a": entry(0.3)}},
            {"a a.fc a.special": ("MODULE_NAME", 0.3), "ab.fc": ("MODULE_NAME", 0.4)},
        ),
        ({"module_name_configs": {"alias": entry(0.3)}}, {"head": ("MODULE_NAME", 0.3)}),
        ({"module_name_configs": {"": entry(0.3)}}, {" ".join(NAMES): ("MODULE_NAME", 0.3)}),
        ({"module_name_configs": {"a": None}}, {"a a.fc a.special": ("MODULE_NAME", None)}),
        ({"module_type_configs": {nn.Linear: None}}, {"a.fc ab.fc head": ("MODULE_TYPE", None)}),
    ],
)
def test_which_entry_holds(fields, expected):
    found = sparsities(Config(**fields))
    assert set(found) == set(NAMES)
    for names, value in expected.items():
        for name in names.split(" ") if names.strip() == names else NAMES:
            assert found.pop(name) == value
    assert set(found.values()) <= {("GLOBAL", 0.5)}


def test_no_global_configuration():
    config = Config(global_config=None, module_type_configs={nn.Linear: entry(0.1)})
    found = sparsities(config)
    assert found["head"] == ("MODULE_TYPE", 0.1)
    assert found["a.special"] == ("GLOBAL", None)


def test_specifications_of_a_module_are_not_inherited():
    config = Config(module_name_configs={"a": entry(0.1, module_state_spec={"w": PruningSpec()})})
    entries = config.build_module_config_dict(Net())[ConfigLevel.MODULE_NAME]
    assert entries["a"].module_state_spec == {"w": PruningSpec()}
    assert entries["a.fc"].module_state_spec == {}
    assert entries["a.fc"].op_state_spec == entries["a"].op_state_spec


def test_a_single_module():
    config = Config(
        module_name_configs={"a": entry(0.3), r".*fc": entry(0.4)},
        module_type_configs={nn.Linear: entry(0.2)},
    )
    found = {
        name: config.get_module_config(name, module).op_state_spec["weight"].target_sparsity
        for name, module in Net().named_modules()
    }
    assert found == {
        "": 0.5,
        "a": 0.3,
        "a.fc": 0.4,
        "a.special": 0.5,
        "ab": 0.5,
        "ab.fc": 0.4,
        "ab.special": 0.5,
        "head": 0.2,
    }


def test_a_pattern_without_a_match_warns_and_lists_candidates():
    config = Config(module_name_configs={"haed": None})
    with pytest.warns(UserWarning, match=r"'haed' matches no module.*'head'"):
        config.build_module_config_dict(Net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Config(module_name_configs={"head": None}).build_module_config_dict(Net())


@pytest.mark.parametrize("pattern", ["(", "*fc"])
def test_a_pattern_that_is_no_regular_expression(pattern):
    with pytest.raises(re.error, match=f"{re.escape(repr(pattern))} is not a valid regular expression"):
        Config(module_name_configs={pattern: None}).build_module_config_dict(Net())


def test_names_of_types():
    assert is_type_named(nn.Linear, "torch.nn.Linear")
    assert is_type_named(nn.Linear, "torch.nn.modules.linear.Linear")
    assert not is_type_named(Special, "torch.nn.Linear")
    assert not is_type_named(nn.Linear, "torch.nn.Bilinear")
    assert not is_type_named(nn.Linear, "nowhere.Linear")
    assert list(Config(module_type_configs={nn.Linear: None}).module_type_configs) == [
        "torch.nn.modules.linear.Linear"
    ]


def test_defaults_are_filled_in():
    default = {"weight": PruningSpec(), "in_proj_weight": PruningSpec()}
    assert ModuleConfig().op_state_spec == OpMagnitudePrunerConfig().op_state_spec == default
    assert ModuleConfig().op_input_spec == ModuleConfig().module_state_spec == {}
    config = ModuleConfig(op_type_config={"linear": {}, "conv2d": None}, op_name_config=None)
    assert config.op_type_config["linear"].op_state_spec == default
    assert config.op_type_config["conv2d"].op_state_spec == {"*": None}
    assert config.op_name_config == {}
    assert ModuleConfig(op_state_spec=None).op_state_spec == {"*": None}
    assert ModuleConfig.apply_defaults(3) == 3


def test_digits_as_keys_are_positions():
    config = ModuleConfig(op_input_spec={"0": None, "-1": None, "name": None, "*": None})
    assert config.op_input_spec == {0: None, "-1": None, "name": None, "*": None}
    with pytest.raises(ValidationError, match="position 0 is given twice"):
        ModuleConfig(op_input_spec={"0": None, 0: None})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Config(globl_config=None), "has no field 'globl_config'.*Did you mean 'global_config'"),
        (lambda: ModuleConfig(op_state_specs={}), "Did you mean 'op_state_spec'"),
        (lambda: OpMagnitudePrunerConfig(weight=1), "has no field 'weight'. Its fields: op_input_spec"),
        (lambda: ModuleConfig(op_input_spec={0: PruningSpec()}), "compresses parameters only: op_input_spec"),
        (lambda: ModuleConfig(module_output_spec={0: PruningSpec()}), "module_output_spec must be empty"),
        (
            lambda: OpMagnitudePrunerConfig(op_output_spec={"*": PruningSpec()}),
            "op_output_spec must be empty",
        ),
        (lambda: ModuleConfig(op_state_spec={"weight": QuantizationSpec()}), "instance of PruningSpec"),
        (lambda: Config(global_config=ModuleConfig(module_state_spec={"w": None})), "cannot be global"),
        (lambda: Config(module_type_configs={"Linear": None}), "must be named with its package"),
        (lambda: Config(module_type_configs={int: None}), "subclass of Module"),
        (lambda: Config(global_config=3), "instance of ModuleMagnitudePrunerConfig"),
    ],
)
def test_invalid_fields(make, message):
    with pytest.raises(ValidationError, match=message):
        make()


def test_a_base_class_configures_nothing():
    with pytest.raises(RuntimeError, match="use a subclass"):
        CompressionConfig()
    with pytest.raises(RuntimeError, match="use a subclass"):
        CompressionConfig.from_dict({})


def test_setters_return_the_configuration():
    config = Config()
    special = entry(0.9)
    assert config.set_global(None).set_module_type(nn.Linear, special).set_module_name("a", None) is config
    assert config.global_config.op_state_spec == {"*": None}
    assert config.module_type_configs["torch.nn.modules.linear.Linear"] is special
    assert config.module_name_configs["a"].op_state_spec == {"*": None}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda c: c.set_global(3), ValidationError),
        (lambda c: c.set_global(ModuleConfig(module_state_spec={"w": PruningSpec()})), ValidationError),
        (lambda c: c.set_module_name("b", 3), ValidationError),
        (lambda c: c.set_module_name(3, None), ValidationError),
        (lambda c: c.set_module_type("Linear", None), ValueError),
        (lambda c: c.set_module_type(3, None), TypeError),
        (lambda c: c.set_module_type(int, None), TypeError),
        (lambda c: c.only_for(), ValueError),
        (lambda c: c.only_for([]), ValueError),
        (lambda c: c.only_for("b", 3), TypeError),
        (lambda c: c.only_for("b", int), TypeError),
        (lambda c: c.only_for("b", ["c"]), TypeError),
        (lambda c: c.without("b", nn.Linear(1, 1)), TypeError),
        (lambda c: setattr(c.module_name_configs["a"], "op_input_spec", {0: PruningSpec()}), ValidationError),
    ],
)
def test_a_refused_change_changes_nothing(change, error):
    config = Config(module_name_configs={"a": entry(0.1)})
    before = config.model_copy(deep=True)
    with pytest.raises(error):
        change(config)
    assert config == before


def test_only_for():
    config = Config(global_config=entry(0.7), module_name_configs={"a": entry(0.1)})
    assert config.only_for(["head", nn.Conv2d]) is config
    assert config.global_config.op_state_spec == {"*": None}
    moved = config.module_name_configs["head"]
    assert moved == config.module_type_configs["torch.nn.modules.conv.Conv2d"] == entry(0.7)
    assert moved is not config.module_type_configs["torch.nn.modules.conv.Conv2d"]
    assert config.module_name_configs["a"] == entry(0.1)
    with pytest.raises(ValueError, match="switched off"):
        config.only_for("b")


def test_without():
    config = Config().without("a", nn.Linear).without()
    assert config.module_name_configs["a"].op_state_spec == {"*": None}
    assert config.module_type_configs["torch.nn.modules.linear.Linear"].op_state_spec == {"*": None}
    assert config.global_config == ModuleConfig()


FULL = Config(
    global_config=entry(0.7, sparsity_schedule=PolynomialDecaySchedule(total_iters=7, power=2.0)),
    module_type_configs={
        nn.Conv2d: ModuleConfig(
            op_state_spec={"*": PruningSpec(pruning_scheme=ChannelStructured(axis=1))},
            sparsity_schedule=ConstantSparsitySchedule(begin_step=3),
        ),
        nn.Linear: None,
    },
    module_name_configs={"a.*": entry(0.2, op_name_config={"a.fc.linear": None}), "b": None},
    global_threshold=True,
)


@pytest.mark.parametrize("config", [Config(), Config(global_config=None), FULL])
def test_round_trips(config, tmp_path):
    assert Config.from_dict(config.to_dict()) == config
    text = config.to_yaml()
    path = tmp_path / "config.yaml"
    path.write_text(text)
    for source in (io.StringIO(text), io.BytesIO(text.encode()), path, str(path)):
        assert Config.from_yaml(source) == config


def test_yaml_with_anchors():
    config = Config.from_yaml(
        io.StringIO(
            """
            pruning_spec:
              quarter: &quarter {target_sparsity: 0.25, pruning_algo: default}
            magnitude_pruning_config:
              global_config:
                op_state_spec: {weight: *quarter}
                sparsity_schedule: {type: constant, begin_step: 2}
              module_type_configs:
                torch.nn.Conv2d: null
            """
        )
    )
    assert config.global_config.op_state_spec == {"weight": PruningSpec(target_sparsity=0.25)}
    assert config.global_config.sparsity_schedule == ConstantSparsitySchedule(begin_step=2)
    assert config.module_type_configs["torch.nn.Conv2d"].op_state_spec == {"*": None}


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({}, RuntimeError, f"no key '{KEY}'"),
        ({KEY: {}, "pruning_specs": {}}, RuntimeError, "Did you mean 'pruning_spec'"),
        ({KEY: None}, TypeError, "must hold a dict, got NoneType"),
        ({KEY: {"global_config": {"sparsity_schedule": {"begin_step": 1}}}}, ValidationError, "Missing type"),
        ({KEY: {"global_config": {"sparsity_schedule": {"type": "constnt"}}}}, KeyError, "mean 'constant'"),
    ],
)
def test_invalid_dicts(data, error, message):
    with pytest.raises(error, match=message):
        Config.from_dict(data)


def test_invalid_yaml(tmp_path):
    with pytest.warns(UserWarning, match="empty"):
        assert Config.from_yaml(io.StringIO("")) is None
    with pytest.raises(ValueError, match="must hold a mapping, got list"):
        Config.from_yaml(io.StringIO("- 1"))
    with pytest.raises(FileNotFoundError):
        Config.from_yaml(tmp_path / "missing.yaml")


def test_yaml_cannot_name_an_unregistered_class():
    class Unregistered(PruningSpec().pruning_algo):
        pass

    config = Config()
    spec = PruningSpec().model_copy(update={"pruning_algo": Unregistered})
    config.global_config.op_state_spec = {"weight": spec}
    with pytest.raises(ValueError, match=r"Unregistered has no registry key"):
        config.to_yaml()
