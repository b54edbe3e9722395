"""Which modules of a model an algorithm works on."""

import difflib
import logging
import re
from collections.abc import Sequence

from torch import nn

from coreai_opt.controllers.core.config import AlgorithmConfig
from coreai_opt.controllers.core.layers import WEIGHTED
from coreai_opt.controllers.core.masks import original
from coreai_opt.controllers.core.owners import Owners, computed_by
from coreai_opt.controllers.core.statistics import LeftWhole

__all__ = ["matching", "modules_in_scope", "nncf_scopes", "select_layers"]

logger = logging.getLogger(__name__)

_BRACKETED = re.compile(r"\[([^\]]*)\]")
# NNCF's names of operations between layers: "Net/Block[block]/__add___0", "relu_1".
_OPERATION = re.compile(r"__\w+__|\w_\d+\$?$")


def nncf_scopes(model: nn.Module) -> dict[str, str]:
    """NNCF's name of each module but the root, by its qualified name: ``Net/Block[block]/Linear[query]``."""
    root = type(model).__name__
    kinds = {name: _class_name(module) for name, module in model.named_modules()}
    scopes = {}
    for name in kinds:
        if name:
            parts = name.split(".")
            paths = [".".join(parts[: index + 1]) for index in range(len(parts))]
            steps = [f"{kinds.get(path, 'Module')}[{part}]" for path, part in zip(paths, parts, strict=True)]
            scopes[name] = "/".join([root, *steps])
    return scopes


def _class_name(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Parametrized")


def modules_in_scope(model: nn.Module, config: AlgorithmConfig) -> set[str]:
    """Names of the modules that the configuration's scopes leave.

    Raises:
        ValueError: a scope matches no module.
    """
    check = config.validate_scopes
    ignored = matching(config.ignored_scopes, model, "ignored_scopes", check)
    names = {name for name, _ in model.named_modules()} - ignored
    if config.target_scopes is None:
        return names
    return names & matching(config.target_scopes, model, "target_scopes", check)


def select_layers(
    model: nn.Module, config: AlgorithmConfig, types: tuple[type[nn.Module], ...] = WEIGHTED
) -> tuple[dict[str, nn.Module], list[LeftWhole]]:
    """The layers of ``types`` that the configuration's scopes leave, by qualified name, in the model's order.

    A scope is a qualified module name, ``"block.query"``; NNCF's form of it,
    ``"Net/Block[block]/Linear[query]"``; or ``"{re}"`` and a regular expression that is searched for in both
    forms. It stands for the module and everything inside. A layer with two names counts once, as do layers
    that share a weight.

    Returns:
        The layers; and those that are left whole, as their weight is also that of an ignored module.

    Raises:
        ValueError: a scope matches no module; a weight is computed by something else in each forward; or no
            layer is left.
    """
    ignored = matching(config.ignored_scopes, model, "ignored_scopes", config.validate_scopes)
    chosen = modules_in_scope(model, config)
    owners = Owners(model)
    layers: dict[str, nn.Module] = {}
    left: list[LeftWhole] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, types) or name not in chosen:
            continue
        if (other := computed_by(module)) is not None:
            raise ValueError(
                f"{config.algorithm}: the weight of {name!r} is computed by {other} in each forward; remove "
                f"that first, or put the layer into ignored_scopes"
            )
        if id(original(module)) in seen:
            continue
        seen.add(id(original(module)))
        sharing = [path for path, _, _ in owners.of(module) if path in ignored]
        if sharing:
            left.append(LeftWhole(name, f"its weight is also that of {sharing[0]!r}, which is ignored"))
        else:
            layers[name] = module
    if not layers:
        kinds = ", ".join(each.__name__ for each in types)
        shared = f"; left whole: {', '.join(f'{e.name} ({e.reason})' for e in left)}" if left else ""
        raise ValueError(
            f"{config.algorithm} finds no layer to work on: none of {kinds} is in the scopes "
            f"(ignored_scopes={config.ignored_scopes}, target_scopes={config.target_scopes}){shared}"
        )
    return layers, left


def matching(scopes: Sequence[str], model: nn.Module, key: str, validate: bool = True) -> set[str]:
    """The modules that scopes stand for, with all inside.

    NNCF's scopes of operations between layers stand for nothing: layers alone are compressed here.

    Args:
        scopes: as :func:`select_layers` says.
        model: has the modules.
        key: where the scopes were configured.
        validate: raise if a scope matches none; else log it.

    Raises:
        ValueError: a scope matches none.
    """
    known = nncf_scopes(model) if scopes else {}
    found: set[str] = set()
    for scope in scopes:
        roots = _roots(scope, known, model)
        if not roots:
            near = difflib.get_close_matches(scope, known, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            message = f"{key}: {scope!r} matches no module of the model.{hint}"
            if validate and not _OPERATION.search(scope):
                raise ValueError(message)
            logger.warning(message)
        prefixes = tuple(f"{root}." for root in roots)
        found.update(name for name in known if name in roots or name.startswith(prefixes))
    return found


def _roots(scope: str, known: dict[str, str], model: nn.Module) -> set[str]:
    if scope.startswith("{re}"):
        pattern = re.compile(scope.removeprefix("{re}"))
        return {
            name for name, path in known.items() if any(pattern.search(each) for each in _forms(name, path))
        }
    if scope in known:
        return {scope}
    if "[" not in scope:
        return set()
    # What follows the last module is an operation: of a layer, its only one; else between layers.
    plain = ".".join(_BRACKETED.findall(scope))
    if scope.endswith("]"):
        return {plain} & known.keys()
    return {plain} if plain in known and isinstance(model.get_submodule(plain), WEIGHTED) else set()


def _forms(name: str, path: str) -> tuple[str, str, str]:
    # NNCF gives the layers that it wraps names of its own: NNCFConv2d[conv].
    head, _, last = path.rpartition("/")
    return name, path, f"{head}/NNCF{last}"
