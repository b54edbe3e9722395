"""Configurations: NNCF's keys, checked."""

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

__all__ = ["AlgorithmConfig", "ConfigModel", "ControllerConfig", "InitArgs", "InputInfo"]

Scopes = list[str]


class ConfigModel(BaseModel):
    """Base of the configurations: unknown keys are errors that name the nearest known one."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = sorted(field.alias or name for name, field in cls.model_fields.items())
        for key in data:
            if key in known or key in cls.model_fields:
                continue
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown key {key!r}.{hint} Known keys: {', '.join(known)}")
        return dict(data)


class AlgorithmConfig(ConfigModel):
    """What every algorithm takes.

    Fields:
        algorithm: its name.
        ignored_scopes: modules to leave out, with all that they contain; see :mod:`.scopes`.
        target_scopes: modules to take, and no others.
        validate_scopes: whether a scope that matches no module is an error, or only logged.
        compression_lr_multiplier: factor on the gradients of the parameters that compression adds.
    """

    algorithm: str
    ignored_scopes: Scopes = Field(default_factory=list)
    target_scopes: Scopes | None = None
    validate_scopes: bool = True
    compression_lr_multiplier: float | None = Field(default=None, ge=0)

    @field_validator("ignored_scopes", "target_scopes", mode="before")
    @classmethod
    def _one_is_a_list(cls, scopes: Any) -> Any:
        return [scopes] if isinstance(scopes, str) else scopes


class InputInfo(ConfigModel):
    """One input of the model, of which an example is made where one is needed.

    Fields:
        sample_size: shape, with the batch.
        type: ``"float"`` or ``"long"``.
        filler: ``"ones"``, ``"zeros"`` or ``"random"``.
        keyword: name of the argument; None for a positional one.
    """

    sample_size: list[int]
    type: str = Field(default="float", pattern="^(float|long)$")
    filler: str = Field(default="ones", pattern="^(ones|zeros|random)$")
    keyword: str | None = None


class Replayed:
    """What an iterator gave is kept, and given again.

    Args:
        source: the iterator.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._seen: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        """All batches, from the first on."""
        index = 0
        while True:
            if index == len(self._seen):
                try:
                    self._seen.append(next(self._source))
                except StopIteration:
                    return
            yield self._seen[index]
            index += 1


class InitArgs(BaseModel):
    """What initialisation needs beside the configuration. See :func:`.register_default_init_args`."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    train_loader: Any = None
    val_loader: Any = None
    criterion: Any = None
    criterion_fn: Any = None
    model_eval_fn: Any = None
    device: Any = None

    _replayed: Any = PrivateAttr(default=None)

    def batches(self) -> Iterator[Any]:
        """The training loader's batches from the first on, also of one that can be read only once."""
        if self._replayed is None:
            once = isinstance(self.train_loader, Iterator)
            self._replayed = Replayed(self.train_loader) if once else self.train_loader
        return iter(self._replayed)

    @property
    def steps_per_epoch(self) -> int | None:
        """Batches of the training loader, if it knows."""
        try:
            return len(self.train_loader) or None
        except TypeError:
            return None


class ControllerConfig(ConfigModel):
    """A whole configuration.

    Fields:
        input_info: the model's inputs.
        compression: one algorithm's configuration, or a list of them.
        compression_lr_multiplier: for all algorithms that give none.
        target_device: accepted and recorded; the numbers do not depend on it.
    """

    input_info: list[InputInfo] = Field(default_factory=list)
    compression: list[dict[str, Any]] = Field(default_factory=list)
    compression_lr_multiplier: float | None = Field(default=None, ge=0)
    target_device: Literal["ANY", "CPU", "CPU_SPR", "GPU", "NPU", "TRIAL", "VPU"] = "ANY"

    _init_args: InitArgs = PrivateAttr(default_factory=InitArgs)

    @field_validator("input_info", "compression", mode="before")
    @classmethod
    def _one_is_a_list(cls, entries: Any) -> Any:
        if isinstance(entries, Mapping | BaseModel):
            entries = [entries]
        return [
            entry.model_dump(exclude_unset=True) if isinstance(entry, AlgorithmConfig) else entry
            for entry in entries
        ]

    @property
    def init_args(self) -> InitArgs:
        """What was registered for initialisation."""
        return self._init_args

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ControllerConfig":
        """Check a dict."""
        return cls.model_validate(dict(config))

    @classmethod
    def from_file(cls, path: str | Path) -> "ControllerConfig":
        """Read a ``.json``, ``.yaml`` or ``.yml`` file.

        Raises:
            ValueError: the name ends otherwise, or the file holds no mapping.
        """
        path = Path(path)
        if path.suffix not in (".json", ".yaml", ".yml"):
            raise ValueError(f"a configuration file ends in .json, .yaml or .yml; got {str(path)!r}")
        text = path.read_text()
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        if not isinstance(data, dict):
            raise ValueError(f"{path} holds a {type(data).__name__}; a configuration is a mapping")
        return cls.from_dict(data)

    from_json = from_file
    from_yaml = from_file

    @classmethod
    def load(cls, config: "ControllerConfig | Mapping[str, Any] | str | Path") -> "ControllerConfig":
        """A configuration from a dict, a file or itself.

        Raises:
            TypeError: it is something else.
            ValueError: it does not hold.
        """
        if isinstance(config, ControllerConfig):
            return config
        if isinstance(config, Mapping):
            return cls.from_dict(config)
        if isinstance(config, str | Path):
            return cls.from_file(config)
        raise TypeError(
            f"config must be a dict, a path of a JSON or YAML file, or a ControllerConfig; "
            f"got a {type(config).__name__}"
        )
