"""Which modules of a model an algorithm works on."""

import difflib
import re
from collections.abc import Sequence

from torch import nn

from coreai_opt.controllers.core.config import AlgorithmConfig
from coreai_opt.controllers.core.layers import WEIGHTED

__all__ = ["matching", "select_layers"]

_BRACKETED = re.compile(r"\[([^\]]*)\]")


def select_layers(
    model: nn.Module, config: AlgorithmConfig, types: tuple[type[nn.Module], ...] = WEIGHTED
) -> dict[str, nn.Module]:
    """The layers of ``types`` that the configuration's scopes leave, by qualified name, in the model's order.

    A scope is a qualified module name, ``"block.query"``; NNCF's form of it,
    ``"Net/Block[block]/Linear[query]"``; or ``"{re}"`` and a regular expression that is searched for in
    qualified names. It stands for the module and everything inside. A layer with two names counts once.

    Raises:
        ValueError: a scope matches no module; or no layer is left.
    """
    names = [name for name, _ in model.named_modules() if name]
    ignored = matching(config.ignored_scopes, names, "ignored_scopes")
    wanted = None if config.target_scopes is None else matching(config.target_scopes, names, "target_scopes")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, types) and name not in ignored and (wanted is None or name in wanted)
    }
    if not layers:
        kinds = ", ".join(each.__name__ for each in types)
        raise ValueError(
            f"{config.algorithm} finds no layer to work on: none of {kinds} is in the scopes "
            f"(ignored_scopes={config.ignored_scopes}, target_scopes={config.target_scopes})"
        )
    return layers


def matching(scopes: Sequence[str], names: Sequence[str], key: str) -> set[str]:
    """The modules of ``names`` that scopes stand for, with all inside; ``key`` is where they were configured.

    Raises:
        ValueError: a scope matches none.
    """
    found: set[str] = set()
    for scope in scopes:
        if scope.startswith("{re}"):
            pattern = re.compile(scope.removeprefix("{re}"))
            roots = [name for name in names if pattern.search(name)]
        else:
            plain = ".".join(_BRACKETED.findall(scope)) if "[" in scope else scope
            roots = [name for name in names if name == plain]
        if not roots:
            near = difflib.get_close_matches(scope, names, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{key}: {scope!r} matches no module of the model.{hint}")
        found.update(
            name for name in names if any(name == root or name.startswith(f"{root}.") for root in roots)
        )
    return found
