"""How the tensors of an operation and of a module are compressed: the entries of a configuration."""

import re
from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from coreai_opt._utils.config_utils import did_you_mean
from coreai_opt.config.spec import CompressionSpec

__all__ = [
    "DISABLED",
    "MODULE_SPECS",
    "Config",
    "ModuleCompressionConfig",
    "OpCompressionConfig",
    "WeightOnlyModuleValidationMixin",
    "WeightOnlyOpValidationMixin",
    "type_argument",
]

_SpecT = TypeVar("_SpecT", bound=CompressionSpec)
_OpConfigT = TypeVar("_OpConfigT", bound="OpCompressionConfig[Any]")

_OP_SPECS = ("op_input_spec", "op_output_spec", "op_state_spec")
MODULE_SPECS = ("module_input_spec", "module_output_spec", "module_state_spec")
DISABLED: dict[str, Any] = dict.fromkeys(_OP_SPECS)


def _convert_none_to_empty_dict(data: Any) -> Any:
    return {} if data is None else data


def _convert_none_to_disabled_spec_dict(data: Any) -> Any:
    return {"*": None} if data is None else data


def _convert_digit_str_keys_to_int(data: Any) -> Any:
    """Positions written as text, as YAML and JSON keys are, become integers."""
    if not isinstance(data, dict):
        return data
    converted: dict[Any, Any] = {}
    for key, value in data.items():
        position = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
        if position in converted:
            raise ValueError(f"position {position} is given twice, as an integer and as text")
        converted[position] = value
    return converted


_EmptyIfNone = BeforeValidator(_convert_none_to_empty_dict)
_DisabledIfNone = BeforeValidator(_convert_none_to_disabled_spec_dict)
_IntegerPositions = BeforeValidator(_convert_digit_str_keys_to_int)

_OpTensorSpec = Annotated[dict[str | int, _SpecT | None] | None, _DisabledIfNone, _IntegerPositions]
_OpStateSpec = Annotated[dict[str, _SpecT | None] | None, _DisabledIfNone]
_ModuleTensorSpec = Annotated[dict[str | int, _SpecT | None] | None, _EmptyIfNone, _IntegerPositions]
_ModuleStateSpec = Annotated[dict[str, _SpecT | None] | None, _EmptyIfNone]
_OpConfigs = Annotated[dict[str, _OpConfigT | None] | None, _EmptyIfNone]


class Config(BaseModel):
    """Base of configurations. Mutable; every assignment is validated; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    # Fields that may hold specifications; None for all.
    _SUPPORTED: ClassVar[tuple[str, ...] | None] = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in data:
                if name not in cls.model_fields:
                    raise PydanticCustomError(
                        "extra_forbidden",
                        "{owner} has no field {name}.{hint} Its fields: {fields}",
                        {
                            "owner": cls.__name__,
                            "name": repr(name),
                            "hint": did_you_mean(name, cls.model_fields),
                            "fields": ", ".join(cls.model_fields),
                        },
                    )
        return data

    # Checked field by field: a refused assignment then leaves the configuration as it was.
    @field_validator(*_OP_SPECS, *MODULE_SPECS, check_fields=False)
    @classmethod
    def _refuse_unsupported_specs(cls, specs: dict[Any, Any] | None, info: ValidationInfo) -> Any:
        supported = cls._SUPPORTED
        if supported is None or info.field_name in supported:
            return specs
        given = [key for key, spec in (specs or {}).items() if spec is not None]
        if given:
            raise ValueError(
                f"{cls.__name__} compresses parameters only: {info.field_name} must be empty or None; "
                f"got specifications for {given}. Use {' or '.join(supported)}."
            )
        return specs


def type_argument(cls: type[BaseModel], base: type) -> Any:
    """The first type that the subclass ``cls`` gives the generic class ``base``; None if it gives none."""
    for ancestor in cls.__mro__:
        generic = vars(ancestor).get("__pydantic_generic_metadata__", {})
        if generic.get("origin") is base and not isinstance(generic["args"][0], TypeVar):
            return generic["args"][0]
    return None


class OpCompressionConfig(Config, ABC, Generic[_SpecT]):
    """How to compress the tensors of an operation.

    Fields that a dict leaves out take the defaults that the subclass names; None switches off.

    Fields:
        op_input_spec: by position or ``"*"`` (any), specifications of inputs.
        op_output_spec: the same, of outputs.
        op_state_spec: by the attribute's name in its module or ``"*"``, of parameters and buffers.
    """

    op_input_spec: _OpTensorSpec[_SpecT]
    op_output_spec: _OpTensorSpec[_SpecT]
    op_state_spec: _OpStateSpec[_SpecT]

    @classmethod
    @abstractmethod
    def get_default_input_spec(cls) -> dict[str | int, Any]:
        """Specifications of inputs where none are given."""

    @classmethod
    @abstractmethod
    def get_default_output_spec(cls) -> dict[str | int, Any]:
        """Specifications of outputs where none are given."""

    @classmethod
    @abstractmethod
    def get_default_state_spec(cls) -> dict[str, Any]:
        """Specifications of parameters and buffers where none are given."""

    @model_validator(mode="before")
    @classmethod
    def apply_defaults(cls, data: Any) -> Any:
        """``data`` with the default specifications for the fields that it lacks."""
        return _with_default_specs(cls, data)


class ModuleCompressionConfig(Config, Generic[_OpConfigT, _SpecT]):
    """How to compress the operations and the boundary of a module.

    Fields that a dict leaves out take the defaults of operations; None switches off.

    Fields:
        op_input_spec, op_output_spec, op_state_spec: for all operations; see :class:`OpCompressionConfig`.
        op_type_config: by an operation's type, e.g. ``"linear"``, what replaces the three.
        op_name_config: the same by its name, a regular expression; takes precedence over the type.
        module_input_spec, module_output_spec, module_state_spec: of the module, without those inside it.
    """

    op_input_spec: _OpTensorSpec[_SpecT]
    op_output_spec: _OpTensorSpec[_SpecT]
    op_state_spec: _OpStateSpec[_SpecT]
    op_type_config: _OpConfigs[_OpConfigT] = Field(default_factory=dict)
    op_name_config: _OpConfigs[_OpConfigT] = Field(default_factory=dict)
    module_input_spec: _ModuleTensorSpec[_SpecT] = Field(default_factory=dict)
    module_output_spec: _ModuleTensorSpec[_SpecT] = Field(default_factory=dict)
    module_state_spec: _ModuleStateSpec[_SpecT] = Field(default_factory=dict)

    @classmethod
    def _get_op_config_class(cls) -> type[OpCompressionConfig[Any]] | None:
        return type_argument(cls, ModuleCompressionConfig)  # type: ignore[no-any-return]

    @model_validator(mode="before")
    @classmethod
    def apply_defaults(cls, data: Any) -> Any:
        """``data`` with the operations' default specifications for the fields that it lacks."""
        op_config = cls._get_op_config_class()
        return data if op_config is None else _with_default_specs(op_config, data)

    @field_validator("op_name_config")
    @classmethod
    def _check_patterns(cls, data: dict[str, Any]) -> dict[str, Any]:
        for pattern in data:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a valid regular expression: {error}") from error
        return data

    @field_validator("op_type_config", "op_name_config")
    @classmethod
    def _disable_none(cls, data: dict[str, Any]) -> dict[str, Any]:
        op_config = cls._get_op_config_class()
        if op_config is None:
            return data
        return {key: op_config(**DISABLED) if config is None else config for key, config in data.items()}


def _with_default_specs(op_config: type[OpCompressionConfig[Any]], data: Any) -> Any:
    if not isinstance(data, dict):
        return data
    defaults = {
        "op_input_spec": op_config.get_default_input_spec,
        "op_output_spec": op_config.get_default_output_spec,
        "op_state_spec": op_config.get_default_state_spec,
    }
    return data | {field: default() for field, default in defaults.items() if field not in data}


class WeightOnlyOpValidationMixin:
    """Of configurations that compress no inputs and outputs of operations."""

    _SUPPORTED: ClassVar[tuple[str, ...] | None] = ("op_state_spec",)

    @classmethod
    def get_default_input_spec(cls) -> dict[str | int, Any]:
        """No specifications."""
        return {}

    @classmethod
    def get_default_output_spec(cls) -> dict[str | int, Any]:
        """No specifications."""
        return {}


class WeightOnlyModuleValidationMixin:
    """Of configurations that compress no inputs and outputs, neither of operations nor of modules."""

    _SUPPORTED: ClassVar[tuple[str, ...] | None] = ("op_state_spec", "module_state_spec")
