"""States of prepared models under the names of float ones: saved for others to read, and loaded from theirs.

A prepared model calls a compressed weight ``fc.parametrizations.weight.original``. Under plain names it is
``fc.weight``, and what simulators hold has :data:`PREFIX` in front.
"""

import logging
from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from coreai_opt.config.spec import CompressionSimulatorBase

__all__ = ["PREFIX", "coded", "decoded", "from_plain_names", "plain_state", "steps_key"]

logger = logging.getLogger(__name__)

PREFIX = "coreai_opt."
"""In front of the coded names of what simulators hold."""

_STEPS = "steps of "


def coded(name: str) -> str:
    """A name in a state under plain names.

    In upper-case digits: transformers renames what looks like the name of a layer as it saves and loads.
    """
    return PREFIX + name.encode().hex().upper()


def decoded(key: str) -> str | None:
    """What was :func:`coded`; None if nothing was."""
    _, found, digits = key.rpartition(PREFIX)
    try:
        return bytes.fromhex(digits).decode() if found else None
    except ValueError:
        return None


def steps_key(kind: str) -> str:
    """The coded name of the steps of a kind of compressor."""
    return coded(_STEPS + kind)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a prepared model under plain names; of a simulator with several names, under the first."""
    originals = dict(_compressed(model))
    first: dict[nn.Module, str] = {}
    of_simulators: dict[str, bool] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, CompressionSimulatorBase):
            of_simulators[name] = first.setdefault(module, name) == name
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        owner = next((each for each in _paths(name) if each in of_simulators), None)
        if owner is None:
            state[originals.get(name, name)] = value
        elif of_simulators[owner]:
            state[coded(name)] = value
    return state


def from_plain_names(model: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *args: Any) -> None:
    """Hook of a prepared model, before it loads a state: plain names become its own.

    Warns in the log where weights come without their simulators' states, which are then of other weights.
    """
    for key in [key for key in state_dict if key.startswith(prefix + PREFIX)]:
        name = decoded(key)
        if name is not None:
            value = state_dict.pop(key)
            if not name.startswith(_STEPS):  # which another hook has read
                state_dict[prefix + name] = value
    stale = []
    for own, plain in _compressed(model):
        if prefix + plain not in state_dict or prefix + own in state_dict:
            continue
        state_dict[prefix + own] = state_dict.pop(prefix + plain)
        chain = own.removesuffix("original")
        if not any(key.startswith(f"{prefix}{chain}0.") for key in state_dict):
            stale.append(plain)
    if stale:
        logger.warning(
            f"{len(stale)} float weights were loaded into compressed ones ({', '.join(stale[:3])}, ...), "
            f"without what their simulators observe: scales and palettes follow in training_mode, or prepare "
            f"the model again"
        )


def _compressed(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of the tensors behind simulators, and their plain names."""
    for name, module in model.named_modules(remove_duplicate=False):
        if parametrize.is_parametrized(module):
            path = f"{name}." if name else ""
            lists: Any = module.parametrizations
            for attribute, chain in lists.items():
                if any(isinstance(each, CompressionSimulatorBase) for each in chain):
                    yield f"{path}parametrizations.{attribute}.original", path + attribute


def _paths(name: str) -> Iterator[str]:
    """The modules on the way to a tensor, the innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
