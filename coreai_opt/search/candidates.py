"""What a layer may be compressed to, and the compressors that do it."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from coreai_opt._call_inputs import Arguments
from coreai_opt.config.compression_config import CompressionConfig
from coreai_opt.config.spec import CompressionSpec
from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig, ModuleKMeansPalettizerConfig
from coreai_opt.palettization import PalettizationSpec as Palettes
from coreai_opt.pruning import (
    MagnitudePruner,
    MagnitudePrunerConfig,
    ModuleMagnitudePrunerConfig,
    PruningSpec,
)
from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, Quantizer, QuantizerConfig
from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity

__all__ = ["Candidate", "checked_candidates", "configurations", "default_candidates", "prepared"]


@dataclass(frozen=True)
class Candidate:
    """One way to compress a weight.

    Attributes:
        name: how reports call it.
        spec: a ``QuantizationSpec``, a ``PalettizationSpec`` or a ``PruningSpec``.
    """

    name: str
    spec: CompressionSpec

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"a candidate's name must be a text; got {self.name!r}")
        if not isinstance(self.spec, QuantizationSpec | Palettes | PruningSpec):
            raise TypeError(
                f"candidate {self.name!r}: spec must be a QuantizationSpec, a PalettizationSpec or a "
                f"PruningSpec; got {type(self.spec).__name__}"
            )

    @property
    def kind(self) -> str:
        """``"pruning"``, ``"palettization"`` or ``"quantization"``."""
        if isinstance(self.spec, PruningSpec):
            return "pruning"
        return "palettization" if isinstance(self.spec, Palettes) else "quantization"


def default_candidates() -> list[Candidate]:
    """Integers of 8 and 4 bits, palettes of 6, 4, 3 and 2 bits, and 75 % sparsity."""
    channels, blocks = PerChannelGranularity(axis=0), PerBlockGranularity(axis=1, block_size=32)
    int4: torch.dtype = torch.int4  # type: ignore[attr-defined]
    return [
        Candidate("int8", QuantizationSpec(dtype=torch.int8, granularity=channels)),
        Candidate("int4 channels", QuantizationSpec(dtype=int4, granularity=channels)),
        Candidate("int4 blocks of 32", QuantizationSpec(dtype=int4, granularity=blocks)),
        *(Candidate(f"palette {bits} bits", Palettes(n_bits=bits)) for bits in (6, 4, 3, 2)),
        Candidate("sparse 75 %", PruningSpec(target_sparsity=0.75)),
    ]


def checked_candidates(candidates: Iterable[Candidate] | None) -> list[Candidate]:
    """The candidates as a list, the default ones for None.

    Raises:
        TypeError: one is no Candidate.
        ValueError: there are none, or two have one name.
    """
    found = default_candidates() if candidates is None else list(candidates)
    for each in found:
        if not isinstance(each, Candidate):
            raise TypeError(f"candidates must be Candidate objects; got {type(each).__name__}")
    names = [each.name for each in found]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"candidates must be at least one, each with a name of its own; got {names}")
    return found


# By kind: the compressor, its configuration, and that of a module. The order is that of preparation.
_COMPRESSORS: dict[str, tuple[Any, Any, Any]] = {
    "pruning": (MagnitudePruner, MagnitudePrunerConfig, ModuleMagnitudePrunerConfig),
    "palettization": (KMeansPalettizer, KMeansPalettizerConfig, ModuleKMeansPalettizerConfig),
    "quantization": (Quantizer, QuantizerConfig, ModuleQuantizerConfig),
}


def _module_config(candidate: Candidate) -> Any:
    config = _COMPRESSORS[candidate.kind][2]
    weight = {"weight": candidate.spec}
    if candidate.kind == "quantization":
        return config(op_state_spec=weight, op_input_spec=None, op_output_spec=None)
    return config(op_state_spec=weight)


def configurations(choice: Mapping[str, Candidate | None]) -> dict[str, CompressionConfig[Any]]:
    """The configurations that compress each layer as chosen, by kind, in the order of preparation.

    Args:
        choice: candidates by the patterns of layers' names; None for layers that stay.
    """
    configs: dict[str, CompressionConfig[Any]] = {}
    for kind, (_, config, _) in _COMPRESSORS.items():
        entries = {
            pattern: _module_config(candidate)
            for pattern, candidate in choice.items()
            if candidate is not None and candidate.kind == kind
        }
        if entries:
            mode = {"execution_mode": "eager"} if kind == "quantization" else {}
            configs[kind] = config(global_config=None, module_name_configs=entries, **mode)
    return configs


def prepared(
    model: nn.Module,
    configs: Mapping[str, CompressionConfig[Any]],
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | Arguments,
    progress: bool = True,
) -> nn.Module:
    """A copy of the model, prepared by the compressors of ``configs``.

    Args:
        model: stays as it is.
        configs: by kind.
        example_inputs: arguments for one forward: positional ones, or a mapping of keyword arguments.
        progress: show a bar where weights are palettized.

    Raises:
        ValueError: a weight is both pruned and otherwise compressed, in a model with palettes.
    """
    pruned: nn.Module | None = None
    if "palettization" in configs and "pruning" in configs:
        # The two refuse a model of the other, as a palette has to know the mask of its weight.
        pruned = prepared(model, {"pruning": configs["pruning"]}, example_inputs, progress)
        configs = {kind: config for kind, config in configs.items() if kind != "pruning"}
    compressed = copy.deepcopy(model)
    for kind, config in configs.items():
        compressor = _COMPRESSORS[kind][0](compressed, config)
        options = {"progress": progress} if kind == "palettization" else {}
        compressed = compressor.prepare(example_inputs, **options)
    if pruned is not None:
        _copy_masks(pruned, compressed)
    return compressed


def _copy_masks(pruned: nn.Module, model: nn.Module) -> None:
    """Put the pruning simulators of one model into another one with the same layers.

    Raises:
        ValueError: a tensor is compressed there already.
    """
    modules = dict(model.named_modules())
    for name, module in pruned.named_modules():
        if parametrize.is_parametrized(module):
            for attribute, chain in module.parametrizations.items():  # type: ignore[operator, union-attr]
                if parametrize.is_parametrized(modules[name], attribute):
                    weight = f"{name}.{attribute}".removeprefix(".")
                    raise ValueError(
                        f"{weight!r} is configured for pruning and for another compression, in a model with "
                        f"palettes: choose one for each weight"
                    )
                for simulator in chain:
                    parametrize.register_parametrization(modules[name], attribute, simulator, unsafe=True)
