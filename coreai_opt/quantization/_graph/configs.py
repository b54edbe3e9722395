"""What a configuration says about a node."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from torch import nn
from torch.fx import Node

from coreai_opt._utils.config_utils import ConfigLevel, canonical_names
from coreai_opt.quantization._graph.nodes import module_stack, op_type
from coreai_opt.quantization.config.quantization_config import (
    ModuleQuantizerConfig,
    OpQuantizerConfig,
    QuantizerConfig,
)
from coreai_opt.quantization.spec import QuantizationSpec

__all__ = ["NodeConfig", "NodeConfigs", "SpecKind", "check_keys", "lookup", "MISSING"]

Specs = Mapping[Any, QuantizationSpec | None]

MISSING: Any = object()


class SpecKind(IntEnum):
    """What of a module's configuration decides on an operation. The lower value takes precedence."""

    OP_NAME = 0
    OP_TYPE = 1
    DEFAULT = 2


@dataclass(frozen=True)
class NodeConfig:
    """The specifications for an operation, and what they come from.

    Fields:
        level: of the module's entry.
        position: of the entry in its level, the lower one taking precedence.
        kind: what of the entry.
        specs: holds ``op_input_spec``, ``op_output_spec`` and ``op_state_spec``.
    """

    level: ConfigLevel
    position: int
    kind: SpecKind
    specs: ModuleQuantizerConfig | OpQuantizerConfig


class NodeConfigs:
    """The configurations of a model's modules, for the nodes of its graph.

    Args:
        model: what was exported.
        config: its configuration.

    Raises:
        ValueError: a name in the configuration is no regular expression.
    """

    def __init__(self, model: nn.Module, config: QuantizerConfig) -> None:
        try:
            self.levels = config.build_module_config_dict(model)
        except re.error as error:
            raise ValueError(str(error)) from error
        self._first_names = canonical_names(model)
        self._by_module = {
            name: (level, 0 if level is ConfigLevel.GLOBAL else position, entry)
            for level, entries in self.levels.items()
            for position, (name, entry) in enumerate(entries.items())
        }
        self._patterns: dict[str, re.Pattern[str]] = {}
        for _, entry in self.entries():
            for pattern in entry.op_name_config or {}:
                self._patterns[pattern] = _compiled(pattern)

    def modules_of(self, node: Node) -> list[str]:
        """First names of the modules whose forward runs the node, the outermost one first."""
        return [self._first_names.get(name, name) for name in module_stack(node)]

    def entries(self) -> Iterator[tuple[str, ModuleQuantizerConfig]]:
        """Each module and its configuration; types come before names, and what takes precedence first."""
        for level in (ConfigLevel.GLOBAL, ConfigLevel.MODULE_TYPE, ConfigLevel.MODULE_NAME):
            yield from self.levels[level].items()

    def of_module(self, name: str) -> ModuleQuantizerConfig | None:
        """The configuration of the module of that first name."""
        found = self._by_module.get(name)
        return found[2] if found is not None else None

    def of(self, node: Node) -> NodeConfig | None:
        """What holds for the node; None if it belongs to no module."""
        modules = self.modules_of(node)
        found = self._by_module.get(modules[-1]) if modules else self._by_module.get("")
        if found is None:
            return None
        level, position, entry = found
        by_name = entry.op_name_config or {}
        for pattern in reversed(by_name):
            if self._patterns[pattern].fullmatch(node.name):
                return NodeConfig(level, position, SpecKind.OP_NAME, by_name[pattern] or entry)
        kind = op_type(node)
        by_type = entry.op_type_config or {}
        if kind in by_type:
            return NodeConfig(level, position, SpecKind.OP_TYPE, by_type[kind] or entry)
        return NodeConfig(level, position, SpecKind.DEFAULT, entry)


def lookup(specs: Specs | None, key: Any) -> Any:
    """The specification under ``key``, else under ``"*"``, else MISSING. None means: do not quantize."""
    found = specs or {}
    return found.get(key, found.get("*", MISSING))


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"op_name_config: {pattern!r} is not a valid regular expression: {error}") from error


def check_keys(config: QuantizerConfig) -> None:
    """NotImplementedError if tensors are named by anything but positions and ``"*"``."""
    entries = [
        ("global_config", config.global_config),
        *((f"module_type_configs[{key!r}]", each) for key, each in config.module_type_configs.items()),
        *((f"module_name_configs[{key!r}]", each) for key, each in config.module_name_configs.items()),
    ]
    for where, entry in entries:
        if entry is None:
            continue
        _check_entry(where, entry)
        for field in ("module_input_spec", "module_output_spec"):
            _check_positions(f"{where}.{field}", getattr(entry, field), single=False)
        for field in ("op_type_config", "op_name_config"):
            for key, each in (getattr(entry, field) or {}).items():
                if each is not None:
                    _check_entry(f"{where}.{field}[{key!r}]", each)


def _check_entry(where: str, entry: ModuleQuantizerConfig | OpQuantizerConfig) -> None:
    _check_positions(f"{where}.op_input_spec", entry.op_input_spec, single=False)
    _check_positions(f"{where}.op_output_spec", entry.op_output_spec, single=True)


def _check_positions(where: str, specs: Specs | None, single: bool) -> None:
    for key in specs or {}:
        if key != "*" and not isinstance(key, int):
            raise NotImplementedError(
                f"{where}: in graph mode tensors are named by their position, such as 0, or by '*' for all; "
                f"got {key!r}"
            )
        if single and key not in (0, "*"):
            raise NotImplementedError(
                f"{where}: in graph mode an operation has one output, named 0 or '*'; got {key!r}"
            )
