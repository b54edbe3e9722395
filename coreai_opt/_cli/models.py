"""Models and configurations that the command line names."""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

__all__ = ["UsageError", "add_configurations", "add_json", "add_model", "compressed", "load", "print_json"]

# What a forward gets: positional arguments, or keyword ones.
Inputs = tuple[Any, ...] | Mapping[str, Any]

# Options, and the kinds of compression that they configure, in the order of preparation.
_KINDS = {"prune": "pruning", "palettize": "palettization", "quantize": "quantization"}


class UsageError(Exception):
    """An argument that cannot be used; the text names it."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """The argument that names a model."""
    parser.add_argument(
        "model", metavar="MODEL", help="module:function that gives a model and example inputs"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option for machines that read."""
    parser.add_argument("--json", action="store_true", help="write JSON to standard output")


def add_configurations(parser: argparse.ArgumentParser) -> None:
    """The options that name configurations to prepare the model with, in the order in which they apply."""
    for kind in _KINDS:
        parser.add_argument(f"--{kind}", type=Path, metavar="YAML", help=f"{kind} as this configuration says")


def load(name: str) -> tuple[nn.Module, Inputs]:
    """The model and the example inputs that ``module:function`` gives.

    Raises:
        UsageError: there is no such function, or it gives something else.
    """
    module_name, separator, function_name = name.partition(":")
    if not separator:
        raise UsageError(f"MODEL must be module:function, e.g. my_models:build; got {name!r}")
    # As `python -m` does, so that a file in the present folder is found.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise
        raise UsageError(
            f"MODEL: there is no module {module_name!r} in {os.getcwd()} or on the path"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(f"MODEL: module {module_name!r} has no function {function_name!r}")
    built = function()
    if not (isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], nn.Module)):
        raise UsageError(
            f"MODEL: {name} must return (model, example_inputs); it returned {type(built).__name__}"
        )
    model, inputs = built
    if not isinstance(inputs, tuple | Mapping):
        raise UsageError(
            f"MODEL: {name} must return the example inputs as a tuple of positional arguments or a mapping "
            f"of keyword arguments; got {type(inputs).__name__}"
        )
    return model, inputs


def compressed(parsed: argparse.Namespace) -> tuple[nn.Module, Inputs]:
    """The model, prepared by the configurations that the arguments name, and its example inputs.

    Raises:
        UsageError: a configuration cannot be read.
    """
    from coreai_opt.palettization import KMeansPalettizerConfig
    from coreai_opt.pruning import MagnitudePrunerConfig
    from coreai_opt.quantization import QuantizerConfig
    from coreai_opt.search.candidates import prepared

    classes: dict[str, Any] = {
        "pruning": MagnitudePrunerConfig,
        "palettization": KMeansPalettizerConfig,
        "quantization": QuantizerConfig,
    }
    model, inputs = load(parsed.model)
    configs = {
        kind: _configuration(option, getattr(parsed, option), classes[kind])
        for option, kind in _KINDS.items()
        if getattr(parsed, option) is not None
    }
    return prepared(model, configs, inputs), inputs


def _configuration(kind: str, path: Path, config: Any) -> Any:
    try:
        found = config.from_yaml(path)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, yaml.YAMLError) as error:
        raise UsageError(f"--{kind} {path}: {error}") from error
    if found is None:
        raise UsageError(f"--{kind} {path}: the file is empty")
    return found


def print_json(parsed: argparse.Namespace, value: Any) -> None:
    """Write plain data to where standard output was when the command began."""
    print(json.dumps(value, indent=2), file=parsed.output)
