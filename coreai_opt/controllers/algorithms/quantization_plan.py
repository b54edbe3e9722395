"""Which tensors of a model are quantized, and how: from the configuration's scopes, and from a forward."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from coreai_opt.base_model_compressor import training_flags
from coreai_opt.controllers.algorithms.quantization_config import (
    QuantizationConfig,
    RangeInitializer,
    TensorConfig,
)
from coreai_opt.controllers.core.inputs import Batch
from coreai_opt.controllers.core.owners import Owners
from coreai_opt.controllers.core.scopes import matching

__all__ = ["ATTENTION_WEIGHTS", "Settings", "Uses", "WeightKey", "attention_weights", "named", "observe_uses"]

ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Attributes of :class:`torch.nn.MultiheadAttention` that it uses as weights of linear layers."""

WeightKey = tuple[str, str]
"""Name of a layer, and the attribute that holds a weight."""


def named(key: WeightKey) -> str:
    """The key in words: the layer's name; with the attribute, where that is not ``weight``."""
    layer, attribute = key
    return layer if attribute == "weight" else f"{layer}.{attribute}"


def attention_weights(model: nn.Module, chosen: set[str]) -> list[WeightKey]:
    """The projections inside attention modules of ``chosen`` names."""
    return [
        (name, attribute)
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and name in chosen
        for attribute in ATTENTION_WEIGHTS
        if getattr(module, attribute, None) is not None
    ]


class Settings:
    """The settings of each layer's tensors, where scopes make them differ.

    Args:
        model: the model.
        config: of quantization.

    Raises:
        ValueError: a scope matches no module, or a setting does not hold.
    """

    def __init__(self, model: nn.Module, config: QuantizationConfig) -> None:
        self._config = config
        self._model = model

        def find(scopes: Iterable[str], key: str) -> set[str]:
            return matching(list(scopes), model, key, config.validate_scopes)

        everything = {name for name, _ in model.named_modules()}
        self._in_group: dict[str, set[str]] = {}
        self._overrides: dict[str, list[tuple[set[str], dict[str, Any]]]] = {}
        for group in ("weights", "activations"):
            own = getattr(config, group)
            wanted = everything
            if own.target_scopes is not None:
                wanted = find(own.target_scopes, f"{group}.target_scopes")
            self._in_group[group] = wanted - find(own.ignored_scopes, f"{group}.ignored_scopes")
            overrides: Mapping[str, dict[str, Any]] = getattr(config.scope_overrides, group)
            self._overrides[group] = [
                (find([scope], f"scope_overrides.{group}"), dict(values))
                for scope, values in overrides.items()
            ]
        precision = config.initializer.precision
        for bits, scope in precision.bitwidth_per_scope if precision is not None else []:
            layer, _, part = scope.partition("|")
            groups = ("weights",) if "WEIGHT" in part.upper() else ("weights", "activations")
            groups = ("activations",) if part and groups != ("weights",) else groups
            layer = layer.removesuffix("/module_weight")
            found = find([layer], "precision.bitwidth_per_scope")
            for group in groups:
                self._overrides[group].append((found, {"bits": bits}))
        self._ranges = [
            (
                each,
                everything if each.target_scopes is None else find(each.target_scopes, "initializer.range"),
                find(each.ignored_scopes, "initializer.range"),
            )
            for each in config.range_initializers()
        ]

    def assign_bits(self, bits: Mapping[str, int]) -> None:
        """Give layers' weights and inputs these bits, whatever was said before."""
        for name, each in bits.items():
            for group in ("weights", "activations"):
                self._overrides[group].append(({name}, {"bits": each}))

    def tensor(self, group: str, name: str) -> TensorConfig | None:
        """The settings of a layer's weight or input; None where it stays as it is."""
        if name not in self._in_group[group]:
            return None
        own: TensorConfig = getattr(self._config, group)
        update: dict[str, Any] = {}
        for names, values in self._overrides[group]:
            if name in names:
                update |= values
        return own.model_copy(update=update) if update else own

    def range_initializer(self, group: str, name: str) -> RangeInitializer:
        """How the range of a layer's weight or input is found."""
        for entry, names, ignored in self._ranges:
            if entry.target_quantizer_group in (None, group) and name in names and name not in ignored:
                return entry
        return RangeInitializer()


@dataclass
class Uses:
    """What a forward of the model does with layers and weights.

    Fields:
        called: layers whose forward ran.
        read: weights that a function read, in a forward of its layer or elsewhere.
        from_outside: layers that read the model's input itself.
        outputs: number of the model's floating-point outputs.
    """

    called: set[str] = field(default_factory=set)
    read: set[WeightKey] = field(default_factory=set)
    from_outside: set[str] = field(default_factory=set)
    outputs: int = 0


class _Reads(TorchFunctionMode):
    """Calls ``note`` with the identity of each tensor that a function gets."""

    def __init__(self, note: Callable[[int], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":
            for value in tree_leaves((args, kwargs or {})):
                if isinstance(value, nn.Parameter):
                    self._note(id(value))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def observe_uses(
    model: nn.Module, batch: Batch, layers: Mapping[str, nn.Module], keys: Iterable[WeightKey]
) -> Uses:
    """Run a forward of the uncompressed part in evaluation mode, and see what it uses.

    Args:
        model: the model.
        batch: arguments of the forward.
        layers: whose forwards are watched.
        keys: of the weights that are watched.
    """
    uses = Uses()
    args, kwargs = batch
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    owners: dict[int, list[WeightKey]] = {}
    of_model = Owners(model)
    for key in keys:
        layer = model.get_submodule(key[0])
        for _, module, attribute in of_model.of(layer, key[1]):
            owners.setdefault(id(_parameter(module, attribute)), []).append(key)

    def see(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        uses.called.add(name)
        value = args[0] if args else next(iter(kwargs.values()), None)
        if any(value is each for each in given):
            uses.from_outside.add(name)

    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: see(name, args, kwargs), with_kwargs=True, prepend=True
        )
        for name, layer in layers.items()
    ]
    try:
        with training_flags(model, False), _Reads(lambda each: uses.read.update(owners.get(each, ()))):
            output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    uses.outputs = sum(isinstance(each, Tensor) and each.is_floating_point() for each in tree_leaves(output))
    return uses


def _parameter(module: nn.Module, attribute: str) -> Any:
    chains: Any = getattr(module, "parametrizations", {})
    return chains[attribute].original if attribute in chains else module._parameters[attribute]
