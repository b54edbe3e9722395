"""Which tensors of a model are compressed, and how: configurations in three levels.

A module is configured by its name, else by its type, else globally. An entry for a module covers the modules
inside it, unless they have an entry of the same or of a higher level. None in place of an entry means: do not
compress. Within a module, operations have specifications for their inputs, outputs and state (parameters).
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Annotated, Any, ClassVar, Generic, Self, TypeVar

import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator
from torch import nn

from coreai_opt._utils.config_utils import (
    ConfigLevel,
    canonical_names,
    did_you_mean,
    full_match,
    is_type_named,
    matching_names,
    original_type,
    plain_data,
    qualified_name,
)
from coreai_opt._utils.reading import yaml_data
from coreai_opt.config._entries import (
    DISABLED,
    MODULE_SPECS,
    Config,
    ModuleCompressionConfig,
    OpCompressionConfig,
    WeightOnlyModuleValidationMixin,
    WeightOnlyOpValidationMixin,
    _convert_none_to_empty_dict,
    type_argument,
)

__all__ = [
    "CompressionConfig",
    "ModuleCompressionConfig",
    "OpCompressionConfig",
    "WeightOnlyModuleValidationMixin",
    "WeightOnlyOpValidationMixin",
]

_EmptyIfNone = BeforeValidator(_convert_none_to_empty_dict)
_T = TypeVar("_T", bound=ModuleCompressionConfig[Any, Any])


class CompressionConfig(Config, Generic[_T]):
    """How to compress a model.

    Fields:
        global_config: for modules without an entry; None for no compression, left out for the default.
        module_type_configs: by class or its dotted name, for modules of exactly that type.
        module_name_configs: by a regular expression that matches the module's whole name.

    Of several entries of one level that match a module, the last one holds.
    """

    # Key of a dict or of a YAML file under which the configuration stands, and of the specifications beside
    # it, which only YAML anchors refer to. Subclasses define them.
    _CONFIG_KEY: ClassVar[str]
    _SPEC_KEY: ClassVar[str]

    global_config: _T | None = None
    module_type_configs: Annotated[dict[str | type[nn.Module], _T | None], _EmptyIfNone] = Field(default={})
    module_name_configs: Annotated[dict[str, _T | None], _EmptyIfNone] = Field(default={})

    @classmethod
    def _get_module_config_class(cls) -> type[_T]:
        found = type_argument(cls, CompressionConfig)
        if found is None:
            raise RuntimeError(f"{cls.__name__} names no class of module configurations: use a subclass")
        return found  # type: ignore[no-any-return]

    @classmethod
    def _disabled(cls) -> _T:
        return cls._get_module_config_class()(**DISABLED)

    @model_validator(mode="before")
    @classmethod
    def _apply_default_global_config(cls, data: Any) -> Any:
        if isinstance(data, dict) and "global_config" not in data:
            return data | {"global_config": cls._get_module_config_class().model_validate({})}
        return data

    @field_validator("global_config")
    @classmethod
    def _check_global_config(cls, config: _T | None) -> _T:
        if config is None:
            return cls._disabled()
        given = [field for field in MODULE_SPECS if getattr(config, field)]
        if given:
            raise ValueError(
                f"{', '.join(given)} cannot be global: a module's boundary is configured by type or name, in "
                f"module_type_configs or module_name_configs"
            )
        return config

    @field_validator("module_type_configs")
    @classmethod
    def _name_types(cls, configs: dict[str | type[nn.Module], _T | None]) -> dict[str | type[nn.Module], _T]:
        return {_type_key(key): config or cls._disabled() for key, config in configs.items()}

    @field_validator("module_name_configs")
    @classmethod
    def _disable_none(cls, configs: dict[str, _T | None]) -> dict[str, _T]:
        for pattern in configs:
            full_match(pattern, "")
        return {key: config or cls._disabled() for key, config in configs.items()}

    def set_global(self, config: _T | None) -> Self:
        """Set the configuration of modules without an entry. Returns self."""
        self.global_config = config
        return self

    def set_module_type(self, module_type: str | type[nn.Module], config: _T | None) -> Self:
        """Set the entry of a module type, a class or its dotted name. Returns self.

        Raises:
            TypeError: ``module_type`` is neither a module class nor a string.
            ValueError: it is a name without a dot.
        """
        self.module_type_configs = {**self.module_type_configs, _type_key(module_type): config}
        return self

    def set_module_name(self, module_name: str, config: _T | None) -> Self:
        """Set the entry of a name, a regular expression. Returns self.

        Raises:
            re.error: it is none.
        """
        self.module_name_configs = {**self.module_name_configs, module_name: config}
        return self

    def only_for(self, *targets: Any) -> Self:
        """Move the global configuration to the ``targets``, and compress nothing else. Returns self.

        Args:
            targets: module classes and names (regular expressions), also as one list or tuple.

        Raises:
            ValueError: there are no targets, or the global configuration is switched off.
            TypeError: a target is neither a module class nor a string.
        """
        names = _unpack_targets(targets)
        if not names:
            raise ValueError("only_for needs at least one target: a module class or a module's name")
        config = self.global_config
        if config is None or config == self._disabled():
            raise ValueError(
                "only_for moves the global configuration to its targets, and that is switched off. "
                "Name all targets in one call, or set a global configuration first."
            )
        for target in names:
            self._set_target(target, config.model_copy(deep=True))
        return self.set_global(None)

    def without(self, *targets: Any) -> Self:
        """Compress nothing in the ``targets``. Arguments and errors as for :meth:`only_for`. Returns self."""
        for target in _unpack_targets(targets):
            self._set_target(target, None)
        return self

    def _set_target(self, target: str | type[nn.Module], config: _T | None) -> None:
        if isinstance(target, str):
            self.set_module_name(target, config)
        else:
            self.set_module_type(target, config)

    def get_module_config(self, name: str, module: nn.Module) -> _T | None:
        """The entry for a module by itself, whatever modules it is inside of."""
        for pattern, config in reversed(self.module_name_configs.items()):
            if full_match(pattern, name):
                return config
        for key, config in reversed(self.module_type_configs.items()):
            if is_type_named(original_type(module), str(key)):
                return config
        return self.global_config

    def build_module_config_dict(self, model: nn.Module) -> dict[ConfigLevel, dict[str, _T]]:
        """For each level, the configurations of the modules that it decides on, by name.

        A module with several names appears under the first. A pattern that matches no module gives a warning
        that names candidates.

        Raises:
            re.error: a name is no regular expression.
        """
        names = canonical_names(model)
        modules = dict(reversed(list(model.named_modules())))
        result: dict[ConfigLevel, dict[str, _T]] = {level: {} for level in ConfigLevel}
        taken: set[str] = set()

        def assign(level: ConfigLevel, matched: set[str], config: _T) -> None:
            inside = config.model_copy(update={field: {} for field in MODULE_SPECS})
            for name in (each for each in modules if each in matched):
                for inner, _ in modules[name].named_modules(prefix=name):
                    first = names[inner]
                    if first not in taken:
                        taken.add(first)
                        result[level][first] = config if first == name else inside

        for pattern, config in reversed(self.module_name_configs.items()):
            assign(ConfigLevel.MODULE_NAME, matching_names(pattern, names), config or self._disabled())
        for key, config in reversed(self.module_type_configs.items()):
            of_type = {
                name for name, module in modules.items() if is_type_named(original_type(module), str(key))
            }
            assign(ConfigLevel.MODULE_TYPE, of_type, config or self._disabled())
        assign(ConfigLevel.GLOBAL, set(modules), self.global_config or self._disabled())
        return result

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> Self:
        """The configuration that stands under the class's key in ``config_dict``.

        Raises:
            RuntimeError: the key is missing, or there is another one.
            TypeError: ``config_dict``, or what stands there, is no dict.
            pydantic.ValidationError: it does not describe a configuration.
            KeyError: a class has a ``type`` that is no registered key.
        """
        if not hasattr(cls, "_CONFIG_KEY"):
            raise RuntimeError(f"{cls.__name__} has no key in dicts: use a subclass")
        if not isinstance(config_dict, Mapping):
            raise TypeError(
                f"config_dict must be a dict with the key {cls._CONFIG_KEY!r}, as to_dict() returns it; got "
                f"{type(config_dict).__name__}"
            )
        known = (cls._CONFIG_KEY, cls._SPEC_KEY)
        for key in config_dict:
            if key not in known:
                raise RuntimeError(
                    f"{cls.__name__}: unexpected key {key!r}.{did_you_mean(key, known)} "
                    f"The configuration is under {cls._CONFIG_KEY!r}, anchors are under {cls._SPEC_KEY!r}."
                )
        if cls._CONFIG_KEY not in config_dict:
            raise RuntimeError(f"{cls.__name__}: no key {cls._CONFIG_KEY!r} in {list(config_dict)}")
        fields = config_dict[cls._CONFIG_KEY]
        if not isinstance(fields, Mapping):
            raise TypeError(f"{cls._CONFIG_KEY!r} must hold a dict, got {type(fields).__name__}")
        return cls(**fields)

    @classmethod
    def from_yaml(cls, yml: str | Path | IO[Any]) -> Self | None:
        """The configuration in a YAML file, a path or an open file; None, with a warning, if it is empty.

        Raises:
            yaml.YAMLError: it is no YAML.
            ValueError: the file holds no mapping, or one that is nested more than 100 levels deep, contains
                itself, or has more than a million values. Other errors as for :meth:`from_dict`.
        """
        if isinstance(yml, str | Path):
            with Path(yml).open("rb") as file:
                return cls.from_yaml(file)
        data = yaml_data(yml)
        if data is None:
            warnings.warn("the YAML file is empty: no configuration", UserWarning, stacklevel=2)
            return None
        if not isinstance(data, dict):
            raise ValueError(f"the YAML file must hold a mapping, got {type(data).__name__}")
        return cls.from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        """The configuration under its key, as :meth:`from_dict` reads it."""
        return {self._CONFIG_KEY: self.model_dump()}

    def to_yaml(self) -> str:
        """The configuration as YAML text, as :meth:`from_yaml` reads it.

        Raises:
            ValueError: it holds a class that is not registered under a key.
        """
        return yaml.safe_dump(plain_data(self.to_dict()), sort_keys=False)


def _type_key(module_type: Any) -> str:
    if isinstance(module_type, type) and issubclass(module_type, nn.Module):
        return qualified_name(module_type)
    if not isinstance(module_type, str):
        raise TypeError(f"a module type must be an nn.Module class or its dotted name, got {module_type!r}")
    if "." not in module_type:
        raise ValueError(
            f"a module type must be named with its package, e.g. 'torch.nn.Linear'; got {module_type!r}"
        )
    return module_type


def _unpack_targets(targets: tuple[Any, ...]) -> list[str | type[nn.Module]]:
    if len(targets) == 1 and isinstance(targets[0], list | tuple):
        targets = tuple(targets[0])
    for target in targets:
        if not (isinstance(target, str) or (isinstance(target, type) and issubclass(target, nn.Module))):
            raise TypeError(f"a target must be an nn.Module class or a module's name, got {target!r}")
    return list(targets)
