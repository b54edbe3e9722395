"""What the configuration of a compressed-tensors checkpoint has to hold for us to read it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

__all__ = ["check_configuration"]


def _checked_target(target: str) -> str:
    if target.startswith("re:"):
        try:
            re.compile(target[3:])
        except re.error as error:
            raise ValueError(f"{target[3:]!r} is no regular expression: {error}") from None
    return target


_Target = Annotated[str, AfterValidator(_checked_target)]


class _Arguments(BaseModel):
    """How one tensor of a layer is quantized. Fields that are not read may hold anything."""

    num_bits: int = Field(ge=1, le=16)
    type: Literal["int", "float"] = "int"
    strategy: str | None = None
    symmetric: bool = True
    dynamic: bool | Literal["local"] = False
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _has_blocks(self) -> "_Arguments":
        if self.strategy in ("group", "tensor_group") and (self.group_size or 0) < 1:
            raise ValueError(f"strategy {self.strategy!r} needs a group_size; got {self.group_size!r}")
        if self.strategy == "block" and min(self.block_structure or (0,)) < 1:
            raise ValueError(f"strategy 'block' needs a block_structure; got {self.block_structure!r}")
        return self


class _Group(BaseModel):
    targets: list[_Target]
    weights: _Arguments | None = None
    input_activations: _Arguments | None = None
    format: str | None = None


class _Configuration(BaseModel):
    config_groups: dict[str, _Group]
    ignore: list[_Target] | None = None
    format: str | None = None

    @model_validator(mode="after")
    def _has_formats(self) -> "_Configuration":
        for name, group in self.config_groups.items():
            if self.format is None and group.format is None:
                raise ValueError(f"neither the configuration nor {name!r} of config_groups has a format")
        return self


def check_configuration(config: Mapping[str, Any], path: Path) -> None:
    """Check a configuration that a file of somebody else's holds.

    Raises:
        ValueError: what is missing, or is not what it has to be, by its place in the configuration.
    """
    try:
        _Configuration.model_validate(config)
    except ValidationError as error:
        wrong = "; ".join(
            ": ".join(filter(None, (".".join(map(str, each["loc"])), each["msg"]))) for each in error.errors()
        )
        raise ValueError(f"path: the quantization_config of {path} cannot be read: {wrong}") from None
