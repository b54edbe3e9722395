"""The parts of a model that are compressed separately, or not at all, unless a configuration says so."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coreai_opt._utils.config_utils import canonical_names, matching_names

__all__ = ["embedding_types", "find_head", "is_tied", "norm_types", "patterns", "refused_by", "routers"]

Weighted = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def norm_types(model: nn.Module) -> list[type[nn.Module]]:
    """The types of the norms whose operations could be quantized; batch norms have none that could."""
    return _types(
        each
        for each in model.modules()
        if "norm" in type(each).__name__.lower() and not isinstance(each, _BatchNorm) and _is_leaf(each)
    )


def embedding_types(model: nn.Module) -> list[type[nn.Module]]:
    """The types of the embeddings."""
    return _types(each for each in model.modules() if isinstance(each, nn.Embedding | nn.EmbeddingBag))


def routers(model: nn.Module) -> list[str]:
    """Names of the modules that choose experts: ``router`` or ``gate`` beside ``experts``."""
    found = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if "experts" in children:
            prefix = f"{name}." if name else ""
            found += [prefix + child for child in children if child in ("gate", "router")]
    return found


def find_head(model: nn.Module) -> str | None:
    """The name of the layer that makes the output: that which transformers names, else the last one."""
    names = {module: name for name, module in model.named_modules()}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output in names:
        return names[output]
    weighted = [name for module, name in names.items() if isinstance(module, Weighted)]
    return weighted[-1] if weighted else None


def is_tied(model: nn.Module, name: str) -> bool:
    """Whether an embedding has the weight of the module of this name."""
    weight = getattr(model.get_submodule(name), "weight", None)
    embeddings = (each for each in model.modules() if isinstance(each, nn.Embedding))
    return isinstance(weight, Tensor) and any(each.weight is weight for each in embeddings)


def refused_by(filter_fn: Callable[[str, nn.Module], Any], model: nn.Module) -> list[str]:
    """Names of the modules with parameters of their own for which ``filter_fn`` is false."""
    modules = list(model.named_modules())
    with_own = [
        (name, module)
        for name, module in modules
        # An entry of the model itself would cover all that is inside of it.
        if any(each is not None for each in module._parameters.values()) and (name or len(modules) == 1)
    ]
    return [name for name, module in with_own if not filter_fn(name, module)]


def patterns(model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    """Regular expressions for exactly these modules: one for several whose names differ in numbers alone."""
    first = canonical_names(model)
    groups: dict[str, set[str]] = {}
    for name in names:
        parts = [r"\d+" if part.isdigit() else re.escape(part) for part in name.split(".")]
        groups.setdefault(r"\.".join(parts), set()).add(name)
    for pattern, group in groups.items():
        if matching_names(pattern, first) == {first[name] for name in group}:
            yield pattern
        else:
            yield from (re.escape(name) for name in sorted(group))


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _types(modules: Iterable[nn.Module]) -> list[type[nn.Module]]:
    return list(dict.fromkeys(type(each) for each in modules))
