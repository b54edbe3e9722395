import pytest

from coreai_opt._utils.registry_utils import ClassRegistryMixin, ConfigRegistryMixin, FunctionRegistryMixin
from coreai_opt.quantization.spec import QParamsCalculatorBase, QuantizationGranularity


@pytest.fixture
def base():
    class Shape(ClassRegistryMixin):
        pass

    @Shape.register("round")
    class Round(Shape):
        pass

    return Shape


@pytest.fixture
def config():
    class Config(ConfigRegistryMixin):
        def __init__(self, **fields):
            self.fields = fields

    @Config.register("one")
    class One(Config):
        pass

    return Config


def test_each_class_has_its_own_registry(base):
    variant = base.get_class("round")
    assert variant.REGISTRY is not base.REGISTRY
    variant.register("oval")(type("Oval", (variant,), {}))
    assert base.list_registry_keys() == {"round"}
    assert variant.list_registry_keys() == {"oval"}


def test_register_returns_the_object_and_replaces_an_earlier_one(base):
    new = base.register("round")(type("Rounder", (base,), {}))
    assert base.get_class("round") is new
    assert base.list_registry_values() == {new}


def test_any_hashable_key_and_any_class_can_be_registered(base):
    assert base.register(5)(int) is int
    assert base.get_class(5) is int
    assert base.resolve(int) is int


@pytest.mark.parametrize("key", ["rond", 3, None])
def test_get_class_of_an_unknown_key_lists_the_known_ones(base, key):
    with pytest.raises(KeyError, match=rf"Shape has nothing registered under the key {key!r}.*\['round'\]"):
        base.get_class(key)


def test_an_unknown_key_is_answered_with_the_nearest(base):
    with pytest.raises(KeyError, match="Did you mean 'round'"):
        base.get_class("rond")
    with pytest.raises(ValueError, match="Did you mean 'round'"):
        base.resolve("rond")


def test_resolve_takes_keys_and_registered_classes(base):
    variant = base.get_class("round")
    assert base.resolve("round") is variant
    assert base.resolve(variant) is variant


@pytest.mark.parametrize("data", [int, 3, None])
def test_resolve_refuses_anything_else(base, data):
    with pytest.raises(ValueError, match=r"is not among the classes registered in Shape: \['Round'\]"):
        base.resolve(data)


def test_resolve_tells_how_to_register_a_subclass(base):
    with pytest.raises(ValueError, match=r"@Shape\.register"):
        base.resolve(type("Oval", (base,), {}))


def test_build_from_dict(config):
    data = {"type": "one", "size": 1}
    built = config.maybe_build_from_dict(data)
    assert type(built).__name__ == "One"
    assert built.fields == {"size": 1}
    assert data == {"type": "one", "size": 1}


def test_build_refuses_a_name_alone(config):
    with pytest.raises(ValueError, match=r"such as One\(\) or {'type': 'one'}"):
        config.maybe_build_from_dict("one")


@pytest.mark.parametrize("data", [3, None])
def test_build_passes_other_things_through(config, data):
    assert config.maybe_build_from_dict(data) is data


def test_build_needs_a_known_type(config):
    with pytest.raises(ValueError, match=r"Missing type key in dict for Config.*\['one'\]"):
        config.maybe_build_from_dict({"size": 1})
    with pytest.raises(KeyError, match="Did you mean 'one'"):
        config.maybe_build_from_dict({"type": "onee"})


def test_function_registry():
    class Functions(FunctionRegistryMixin):
        pass

    function = Functions.register("identity")(lambda value: value)
    assert Functions.get_function("identity") is function
    with pytest.raises(KeyError, match="identity"):
        Functions.get_function("identty")


def test_built_in_keys():
    assert QuantizationGranularity.list_registry_keys() == {"per_tensor", "per_channel", "per_block"}
    assert QParamsCalculatorBase.list_registry_keys() == {
        "default",
        "static",
        "dynamic",
        "moving_average",
        "global_minmax",
    }
