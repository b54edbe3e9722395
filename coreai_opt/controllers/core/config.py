"""Configurations: NNCF's keys, checked."""

import difflib
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from coreai_opt._utils.reading import json_data, yaml_data

__all__ = [
    "AccuracyAwareConfig",
    "AccuracyAwareParams",
    "AlgorithmConfig",
    "BatchnormAdaptation",
    "BatchnormInitializer",
    "ConfigModel",
    "ControllerConfig",
    "InitArgs",
    "InputInfo",
]

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


class BatchnormAdaptation(ConfigModel):
    """On how many samples batch-norm statistics are found anew; 0 for not at all."""

    num_bn_adaptation_samples: int = Field(default=2000, ge=0)


class BatchnormInitializer(ConfigModel):
    """What is initialised from data by an algorithm that needs no ranges."""

    batchnorm_adaptation: BatchnormAdaptation | None = None

    @property
    def samples(self) -> int:
        """Samples that are asked for."""
        asked = self.batchnorm_adaptation
        return 0 if asked is None else asked.num_bn_adaptation_samples


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


_TOKENS = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/|,(?=\s*[}\]])', re.DOTALL)


def without_comments(text: str) -> str:
    """JSON without ``//`` and ``/* */`` comments, and without commas before a closing bracket."""
    for _ in range(2):  # a comma may stand before a comment
        text = _TOKENS.sub(lambda found: found[0] if found[0].startswith('"') else " ", text)
    return text


class AccuracyAwareParams(ConfigModel):
    """See :mod:`coreai_opt.controllers.training.accuracy_aware`.

    Fields:
        maximal_relative_accuracy_degradation: what may be lost, in percent of the uncompressed accuracy.
        maximal_absolute_accuracy_degradation: what may be lost, in the accuracy's own unit, instead.
        maximal_total_epochs: when training ends in any case.
        initial_training_phase_epochs: of training as the configuration says, before rates are searched.
        patience_epochs: epochs at a rate until it counts as too high.
        initial_compression_rate_step, compression_rate_step_reduction_factor, minimal_compression_rate_step:
            of the search.
        lr_reduction_factor: on the learning rate of an optimizer that is made after an epoch without success.
    """

    maximal_relative_accuracy_degradation: float | None = None
    maximal_absolute_accuracy_degradation: float | None = None
    maximal_total_epochs: int = Field(default=10000, ge=1)
    initial_training_phase_epochs: int = Field(default=5, ge=0)
    patience_epochs: int = Field(default=3, ge=1)
    initial_compression_rate_step: float = Field(default=0.1, gt=0, lt=1)
    compression_rate_step_reduction_factor: float = Field(default=0.5, gt=0, lt=1)
    minimal_compression_rate_step: float = Field(default=0.025, gt=0, lt=1)
    lr_reduction_factor: float = Field(default=0.5, gt=0, le=1)

    @model_validator(mode="after")
    def _one_budget(self) -> "AccuracyAwareParams":
        given = (self.maximal_relative_accuracy_degradation, self.maximal_absolute_accuracy_degradation)
        if all(each is not None for each in given):
            raise ValueError(
                "maximal_relative_accuracy_degradation and maximal_absolute_accuracy_degradation exclude "
                "each other: give one"
            )
        return self

    def least(self, uncompressed: float) -> float:
        """The least accuracy that will do; without a budget, 99 % of the uncompressed model's."""
        if self.maximal_absolute_accuracy_degradation is not None:
            return uncompressed - self.maximal_absolute_accuracy_degradation
        percent = self.maximal_relative_accuracy_degradation
        return uncompressed - abs(uncompressed) * (1.0 if percent is None else percent) / 100


class AccuracyAwareConfig(ConfigModel):
    """Accuracy-aware training: which loop, and its parameters."""

    mode: Literal["early_exit", "adaptive_compression_level"]
    params: AccuracyAwareParams = Field(default_factory=AccuracyAwareParams)


class ControllerConfig(ConfigModel):
    """A whole configuration.

    Keys that are none of these, as training scripts have them in one file with the compression, are ignored
    with one warning; misspelled ones are errors.

    Fields:
        input_info: the model's inputs.
        compression: one algorithm's configuration, or a list of them.
        compression_lr_multiplier: for all algorithms that give none.
        accuracy_aware_training: see :func:`.create_accuracy_aware_training_loop`.
        target_device: accepted and recorded; the numbers do not depend on it.
        disable_shape_matching: accepted; there is no graph whose shapes would be matched.
        log_dir: accepted and recorded.
    """

    input_info: list[InputInfo] = Field(default_factory=list)
    compression: list[dict[str, Any]] = Field(default_factory=list)
    compression_lr_multiplier: float | None = Field(default=None, ge=0)
    accuracy_aware_training: AccuracyAwareConfig | None = None
    target_device: Literal["ANY", "CPU", "CPU_SPR", "GPU", "NPU", "TRIAL", "VPU"] = "ANY"
    disable_shape_matching: bool = False
    log_dir: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _ignore_foreign_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        foreign = [
            key
            for key in data
            if key not in cls.model_fields
            and not difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.8)
        ]
        if foreign:
            warnings.warn(
                f"the configuration has keys that are not those of compression, and are ignored: {foreign}",
                stacklevel=2,
            )
        return {key: value for key, value in data.items() if key not in foreign}

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
        """Read a ``.json``, ``.yaml`` or ``.yml`` file. JSON may have comments and trailing commas.

        Raises:
            yaml.YAMLError: it is no YAML.
            ValueError: the name ends otherwise; or the file is no JSON, or holds no mapping, or one that is
                nested more than 100 levels deep, contains itself, or has more than a million values.
        """
        path = Path(path)
        if path.suffix not in (".json", ".yaml", ".yml"):
            raise ValueError(f"a configuration file ends in .json, .yaml or .yml; got {str(path)!r}")
        text = path.read_text()
        data = json_data(without_comments(text)) if path.suffix == ".json" else yaml_data(text)
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
