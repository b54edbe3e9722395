"""Configuration of quantization: which tensors of a model, how, and when."""

from enum import auto
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from coreai_opt._utils.config_utils import did_you_mean
from coreai_opt._utils.renamed_members import RenamedMembersEnum
from coreai_opt.config.compression_config import (
    CompressionConfig,
    ModuleCompressionConfig,
    OpCompressionConfig,
)
from coreai_opt.quantization.config._presets import ModuleQuantizerPresets, QuantizerPresets
from coreai_opt.quantization.spec import QuantizationSpec
from coreai_opt.quantization.spec.spec import (
    default_activation_quantization_spec,
    default_weight_quantization_spec,
)

__all__ = [
    "ExecutionMode",
    "InvalidExecutionModeError",
    "KVCacheQuantConfig",
    "ModuleQuantizerConfig",
    "OpQuantizerConfig",
    "QATSchedule",
    "QuantizerConfig",
]


class ExecutionMode(RenamedMembersEnum):
    """What a quantizer works on: the model's modules as they run, or a graph exported from it.

    The deprecated name ``PT2E`` stands for ``GRAPH``.
    """

    GRAPH = auto()
    EAGER = auto()

    @classmethod
    def _renamed(cls) -> dict[str, str]:
        return {"PT2E": "GRAPH"}


class InvalidExecutionModeError(ValueError):
    """An execution mode that does not exist."""

    def __init__(self, execution_mode: Any) -> None:
        allowed = " or ".join(repr(str(mode)) for mode in ExecutionMode)
        super().__init__(f"execution_mode must be {allowed}; got {execution_mode!r}")


def _refuse_unknown_fields(cls: type[BaseModel], data: Any) -> Any:
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


class QATSchedule(BaseModel):
    """When training observes and simulates, in steps counted by ``Quantizer.step``. Immutable.

    Fields:
        enable_observer: the first step that observes.
        enable_fake_quant: the first step that simulates; not before the first that observes.
        disable_observer: the first step that observes no more; None for never.
    """

    model_config = ConfigDict(frozen=True)

    enable_observer: Annotated[int, Field(ge=0)] = 0
    enable_fake_quant: Annotated[int, Field(ge=0)] = 0
    disable_observer: Annotated[int, Field(gt=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, data: Any) -> Any:
        return _refuse_unknown_fields(cls, data)

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.enable_fake_quant < self.enable_observer:
            raise ValueError(
                f"enable_fake_quant ({self.enable_fake_quant}) must not be before enable_observer "
                f"({self.enable_observer}): there is nothing to simulate with until something was observed"
            )
        if self.disable_observer is not None and self.disable_observer <= self.enable_observer:
            raise ValueError(
                f"disable_observer ({self.disable_observer}) must be after enable_observer "
                f"({self.enable_observer})"
            )
        if self.disable_observer is not None and self.disable_observer < self.enable_fake_quant:
            raise ValueError(
                f"disable_observer ({self.disable_observer}) must not be before enable_fake_quant "
                f"({self.enable_fake_quant})"
            )
        return self

    def flags_at(self, step: int) -> tuple[bool, bool]:
        """Whether to observe, and whether to simulate, after ``step`` steps."""
        ends = self.disable_observer
        observes = self.enable_observer <= step and (ends is None or step < ends)
        return observes, step >= self.enable_fake_quant


class OpQuantizerConfig(OpCompressionConfig[QuantizationSpec]):
    """How to quantize the inputs, outputs and state of an operation. By default, 8-bit integers."""

    @classmethod
    def get_default_input_spec(cls) -> dict[str | int, Any]:
        """8-bit activations, whatever their position."""
        return {"*": default_activation_quantization_spec()}

    @classmethod
    def get_default_output_spec(cls) -> dict[str | int, Any]:
        """8-bit activations, whatever their position."""
        return {"*": default_activation_quantization_spec()}

    @classmethod
    def get_default_state_spec(cls) -> dict[str, Any]:
        """8-bit weights, per channel."""
        return {"weight": default_weight_quantization_spec()}


class ModuleQuantizerConfig(ModuleCompressionConfig[OpQuantizerConfig, QuantizationSpec]):
    """How to quantize a module, and the modules inside it.

    Fields:
        qat_schedule: when training observes and simulates; None for always.
    """

    presets: ClassVar[ModuleQuantizerPresets["ModuleQuantizerConfig"]] = ModuleQuantizerPresets()

    qat_schedule: QATSchedule | None = None


class KVCacheQuantConfig(BaseModel):
    """How to quantize a key-value cache. Immutable.

    Fields:
        op_quantizer_config: its ``op_input_spec`` has one entry, at the position of the new keys or values
            among the inputs of the operation that updates the cache; its ``op_output_spec`` is empty or None.
    """

    model_config = ConfigDict(frozen=True)

    op_quantizer_config: OpQuantizerConfig

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, data: Any) -> Any:
        return _refuse_unknown_fields(cls, data)

    @model_validator(mode="after")
    def _check_specs(self) -> Self:
        config = self.op_quantizer_config
        keys = list(config.op_input_spec or {})
        if len(keys) != 1 or not isinstance(keys[0], int) or keys[0] < 0:
            raise ValueError(
                f"op_input_spec must have one key, the position (0 or more) of the new keys or values among "
                f"the operation's inputs; got the keys {keys}"
            )
        if (config.op_input_spec or {})[keys[0]] is None:
            raise ValueError(f"op_input_spec[{keys[0]}] must be a QuantizationSpec; got None")
        given = [key for key, spec in (config.op_output_spec or {}).items() if spec is not None]
        if given:
            raise ValueError(
                f"op_output_spec must be empty or None, the cache is dequantized where it is read; "
                f"got specifications for {given}"
            )
        return self

    @property
    def quant_input_idx(self) -> int:
        """Position of the new keys or values among the operation's inputs."""
        return int(next(iter(self.op_quantizer_config.op_input_spec or {})))


class QuantizerConfig(CompressionConfig[ModuleQuantizerConfig]):
    """How to quantize a model.

    Fields:
        preserved_attributes: names of attributes to keep in graph mode.
        execution_mode: modules as they run, or an exported graph.
        kv_cache_quant_configs: by name, how to quantize caches, in graph mode.
    """

    _CONFIG_KEY: ClassVar[str] = "quantization_config"
    _SPEC_KEY: ClassVar[str] = "quantization_spec"
    presets: ClassVar[QuantizerPresets["QuantizerConfig"]] = QuantizerPresets()

    preserved_attributes: list[str] | None = None
    execution_mode: ExecutionMode = ExecutionMode.GRAPH
    kv_cache_quant_configs: dict[str, KVCacheQuantConfig] | None = None

    @field_validator("execution_mode", "kv_cache_quant_configs")
    @classmethod
    def _check_kv_cache(cls, value: Any, info: ValidationInfo) -> Any:
        fields: dict[Any, Any] = {"kv_cache_quant_configs": None, **info.data, info.field_name: value}
        mode = fields.get("execution_mode", ExecutionMode.GRAPH)
        if fields["kv_cache_quant_configs"] is not None and mode is not ExecutionMode.GRAPH:
            raise ValueError(f"kv_cache_quant_configs are for graph mode only; got execution_mode={mode}")
        return value

    def set_execution_mode(self, mode: ExecutionMode | str) -> Self:
        """Set what the quantizer works on. Returns self.

        Raises:
            InvalidExecutionModeError: there is no such mode.
        """
        try:
            chosen = ExecutionMode(mode)
        except ValueError:
            raise InvalidExecutionModeError(mode) from None
        self.execution_mode = chosen
        return self
