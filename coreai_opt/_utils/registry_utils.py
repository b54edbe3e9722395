"""Registries: classes and functions that a configuration names by a key.

Every class that derives from a mixin has a registry of its own, ``REGISTRY``, which its subclasses do not
share: ``Base.register("x")`` makes a class known to ``Base`` alone.
"""

import difflib
from abc import ABC
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast, get_args

from pydantic import BaseModel, ConfigDict, model_serializer, model_validator

__all__ = [
    "ClassRegistryMixin",
    "ConfigRegistryMixin",
    "FunctionRegistryMixin",
    "RegisteredConfig",
    "RegistryMixin",
    "registry_key",
]

T = TypeVar("T")
ConfigType = TypeVar("ConfigType", bound="ConfigRegistryMixin")


class RegistryMixin(ABC):
    """A class with a registry of objects."""

    REGISTRY: ClassVar[OrderedDict[Any, Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.REGISTRY = OrderedDict()

    # ABC has a method of this name for virtual subclasses, with another meaning; the API gives it this one.
    @classmethod
    def register(cls, key: Any) -> Callable[[T], T]:  # type: ignore[override]
        """Decorator that enters an object under ``key``; an object entered there before is replaced."""

        def enter(obj: T) -> T:
            cls.REGISTRY[key] = obj
            return obj

        return enter

    @classmethod
    def _get_object(cls, key: Any) -> Any:
        if key in cls.REGISTRY:
            return cls.REGISTRY[key]
        raise KeyError(f"{cls.__name__} has nothing registered under the key {key!r}. {cls._known_keys(key)}")

    @classmethod
    def _known_keys(cls, key: Any) -> str:
        known = sorted(map(str, cls.REGISTRY))
        near = difflib.get_close_matches(str(key), known, n=1)
        return f"Its keys: {known}" + (f". Did you mean {near[0]!r}?" if near else "")

    @classmethod
    def list_registry_keys(cls) -> set[str]:
        """The keys in use."""
        return set(cls.REGISTRY)

    @classmethod
    def list_registry_values(cls) -> set[Any]:
        """The registered objects."""
        return set(cls.REGISTRY.values())


class ClassRegistryMixin(RegistryMixin):
    """A class with a registry of classes."""

    @classmethod
    def get_class(cls, key: Any) -> Any:
        """The class registered under ``key``.

        Raises:
            KeyError: there is none; the message lists the keys there are.
        """
        return cls._get_object(key)

    @classmethod
    def resolve(cls, data: str | type) -> type:
        """The registered class that ``data``, a key or the class itself, stands for.

        Raises:
            ValueError: ``data`` is neither a key of this registry nor a class in it.
        """
        if isinstance(data, str):
            if data not in cls.REGISTRY:
                raise ValueError(
                    f"{cls.__name__} has no class registered under the key {data!r}. {cls._known_keys(data)}"
                )
            return cast(type, cls.REGISTRY[data])
        if isinstance(data, type) and data in cls.REGISTRY.values():
            return data
        name = data.__name__ if isinstance(data, type) else data
        known = sorted(registered.__name__ for registered in cls.REGISTRY.values())
        hint = ""
        if isinstance(data, type) and issubclass(data, cls):
            hint = f". Register it first: @{cls.__name__}.register('a key')"
        raise ValueError(f"{name} is not among the classes registered in {cls.__name__}: {known}{hint}")


class ConfigRegistryMixin(ClassRegistryMixin):
    """A configuration class with a registry of its variants."""

    @classmethod
    def maybe_build_from_dict(cls: type[ConfigType], data: ConfigType | dict[str, Any]) -> ConfigType:
        """Build the variant that ``data["type"]`` names from the other entries.

        What is neither a dict nor a string is returned as it is.

        Raises:
            ValueError: the dict has no ``type``; or ``data`` is a string.
            KeyError: ``type`` is no key of the registry.
        """
        if isinstance(data, str):
            key = data if data in cls.REGISTRY else next(iter(cls.REGISTRY), data)
            raise ValueError(
                f"a {cls.__name__} is given as an object or as a dict with its type and arguments, such as "
                f"{_example(cls, key)}; got the string {data!r}."
                + ("" if data in cls.REGISTRY else f" {cls._known_keys(data)}")
            )
        if not isinstance(data, dict):
            return data
        if "type" not in data:
            raise ValueError(
                f"Missing type key in dict for {cls.__name__}: it names the variant, "
                f"one of {sorted(map(str, cls.REGISTRY))}"
            )
        arguments = dict(data)
        variant = cls.get_class(arguments.pop("type"))
        return cast(ConfigType, variant(**arguments))


def _example(cls: Any, key: Any) -> str:
    """An object of the class under ``key``, and the same as a dict, as one may write them."""
    variant = cls.REGISTRY.get(key, cls)
    fields = getattr(variant, "model_fields", {})
    # Literal[None] and the like say that there is nothing to choose.
    usual = {"axis": 0, "block_size": 32, "group_size": 16, "n": 2, "m": 4}
    has_axis = fields.get("axis") is not None and int in _types_in(fields["axis"].annotation)
    given = {name: usual[name] for name in fields if name in usual and (name != "axis" or has_axis)}
    call = ", ".join(f"{name}={value}" for name, value in given.items())
    return f"{variant.__name__}({call}) or { ({'type': key} | given)!r}"


def _types_in(annotation: Any) -> set[Any]:
    inner = get_args(annotation)
    return {annotation} if not inner else set().union(*map(_types_in, inner))


def registry_key(cls: type) -> Any:
    """The key of a class in the registry of its nearest base that has it; None if no base does."""
    for base in cls.__mro__[1:]:
        for key, registered in vars(base).get("REGISTRY", {}).items():
            if registered is cls:
                return key
    return None


class RegisteredConfig(BaseModel, ConfigRegistryMixin):
    """Base of immutable configuration classes whose variants a dict names by ``type``.

    A dump holds the ``type`` too, so that loading it gives the same object.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _accept_own_type(cls, data: Any) -> Any:
        if isinstance(data, dict) and "type" in data and data["type"] == registry_key(cls):
            return {name: value for name, value in data.items() if name != "type"}
        return data

    @model_serializer
    def _serialize_model(self) -> dict[str, Any]:
        data = {name: getattr(self, name) for name in type(self).model_fields}
        key = registry_key(type(self))
        return data if key is None else data | {"type": key}


class FunctionRegistryMixin(RegistryMixin):
    """A class with a registry of functions."""

    @classmethod
    def get_function(cls, key: Any) -> Any:
        """The function registered under ``key``.

        Raises:
            KeyError: there is none; the message lists the keys there are.
        """
        return cls._get_object(key)
