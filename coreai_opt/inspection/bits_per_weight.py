"""How many bits a compressed model's parameters and buffers take."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from coreai_opt._prepared_models import PREPARED_MARK
from coreai_opt.config.spec import CompressionSimulatorBase
from coreai_opt.config.spec.storage import dense_bits, simulated_bits
from coreai_opt.export.parametrized import FinalizedWeight
from coreai_opt.inspection._finalized_storage import (
    ACTIVATION_MODULES,
    METADATA_PREFIX,
    bits_with_metadata,
    finalized_size,
)
from coreai_opt.inspection._graph_storage import is_prepared_graph, weight_quantizers

__all__ = ["BitsPerWeightResult", "bits_per_weight"]


@dataclass(repr=False)
class BitsPerWeightResult:
    """The storage that a model's tensors take.

    Attributes:
        bpw: average bits of an element, 0.0 for a model without tensors.
        per_module_map: the same for each module's own tensors, by the module's name.
        total_bits: bits of all tensors.
        total_weights: elements of all tensors.
    """

    bpw: float
    per_module_map: dict[str, float] = field(default_factory=dict)
    total_bits: int = 0
    total_weights: int = 0

    def __repr__(self) -> str:
        return (
            f"BitsPerWeightResult(bpw={self.bpw:.4f}, total_bits={self.total_bits}, "
            f"total_weights={self.total_weights})"
        )


@dataclass(frozen=True)
class StoredTensor:
    """A parameter or buffer as it would be stored.

    Attributes:
        module_name: the module that owns it.
        name: its name there.
        elements: how many values it stands for.
        bits: what they take, with everything needed to restore them.
        simulators: the compressions that it goes through.
    """

    module_name: str
    name: str
    elements: int
    bits: int
    simulators: tuple[CompressionSimulatorBase, ...] = ()


def bits_per_weight(model: nn.Module) -> BitsPerWeightResult:
    """The bits that the parameters and buffers of ``model`` take, compressed as they are prepared.

    Quantized and palettized weights count with their scales, zero points and palettes; pruned ones as a mask
    of one bit an element and the values that stay, or densely where that takes less. Everything else,
    such as biases and statistics of norms, counts with the bits of its dtype. Shared tensors count once.
    Simulators of activations store nothing.

    Args:
        model: a float model, or one prepared by any compressors in either mode, or finalized. For torch the
            weights are dense again; for Core AI and Core ML they count as their converters store them.

    Raises:
        TypeError: ``model`` is no module.
        NotImplementedError: the model is an exported program or a graph without quantizers, or has a
            parametrization, such as weight_norm, that keeps several tensors for one.
    """
    stored = list(stored_tensors(model))
    total_bits = sum(tensor.bits for tensor in stored)
    total_elements = sum(tensor.elements for tensor in stored)
    by_module: dict[str, tuple[int, int]] = {}
    for tensor in stored:
        bits, elements = by_module.get(tensor.module_name, (0, 0))
        by_module[tensor.module_name] = (bits + tensor.bits, elements + tensor.elements)
    return BitsPerWeightResult(
        bpw=total_bits / total_elements if total_elements else 0.0,
        per_module_map={name: bits / elements for name, (bits, elements) in by_module.items() if elements},
        total_bits=total_bits,
        total_weights=total_elements,
    )


def stored_tensors(model: nn.Module) -> Iterator[StoredTensor]:
    """The tensors that a model stores, each once, under the first module that owns it.

    Raises:
        NotImplementedError: see :func:`bits_per_weight`.
    """
    if not isinstance(model, nn.Module | torch.export.ExportedProgram):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    quantizers: dict[str, Any] = {}
    if is_prepared_graph(model):
        quantizers = weight_quantizers(cast(torch.fx.GraphModule, model))
    elif isinstance(model, torch.fx.GraphModule | torch.export.ExportedProgram):
        raise NotImplementedError(
            "bits_per_weight counts models and prepared graphs; this graph has no quantizers. "
            "Count the prepared model, before it is finalized for a converter or exported"
        )
    seen: set[int] = set()
    for module_name, module in _walk(model):
        for name, tensor, chain in _own_tensors(module_name, module):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                chain = chain or quantizers.get(f"{module_name}.{name}".removeprefix("."), ())
                elements, bits = _size(module, name, tensor, chain)
                simulators = tuple(each for each in chain if isinstance(each, CompressionSimulatorBase))
                yield StoredTensor(module_name, name, elements, bits, simulators)


def _size(module: nn.Module, name: str, tensor: Tensor, chain: Sequence[nn.Module]) -> tuple[int, int]:
    """Elements and bits of a tensor behind these parametrizations."""
    finalized = [each for each in chain if isinstance(each, FinalizedWeight)]
    if finalized:
        return finalized_size(finalized)
    simulators = [each for each in chain if isinstance(each, CompressionSimulatorBase)]
    if simulators:
        return tensor.numel(), simulated_bits(tensor, simulators)
    with_metadata = bits_with_metadata(module, name, tensor)
    return tensor.numel(), dense_bits(tensor) if with_metadata is None else with_metadata


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model but those that compress, and what is below them."""
    pending = [("", model)]
    seen: set[nn.Module] = set()
    while pending:
        name, module = pending.pop()
        if module in seen or isinstance(module, (CompressionSimulatorBase, *ACTIVATION_MODULES)):
            continue
        seen.add(module)
        yield name, module
        children = [
            (f"{name}.{child_name}".removeprefix("."), child)
            for child_name, child in module.named_children()
            if not (child_name == "parametrizations" and is_parametrized(module))
        ]
        pending.extend(reversed(children))


def _own_tensors(module_name: str, module: nn.Module) -> Iterator[tuple[str, Tensor, Sequence[nn.Module]]]:
    if is_parametrized(module):
        for name, chain in module.parametrizations.items():  # type: ignore[operator, union-attr]
            yield name, _original(f"{module_name}.{name}".removeprefix("."), chain), list(chain)
    for name, parameter in module.named_parameters(recurse=False):
        yield name, parameter, ()
    for name, buffer in module.named_buffers(recurse=False):
        if name != PREPARED_MARK and not name.startswith(METADATA_PREFIX):
            yield name, buffer, ()


def _original(name: str, chain: ParametrizationList) -> Tensor:
    original = getattr(chain, "original", None)
    if original is None:
        raise NotImplementedError(
            f"bits_per_weight cannot tell the size of {name!r}: its parametrization keeps several tensors "
            f"({', '.join(found for found, _ in chain.named_parameters(recurse=False))})"
        )
    return original  # type: ignore[no-any-return]
