"""Specifications in place of what operations agreed on: of modules' boundaries, states, and caches."""

import logging
from collections.abc import Iterator
from typing import Any

from torch.fx import Graph, Node

from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization._graph.configs import MISSING, NodeConfigs, lookup
from coreai_opt.quantization._graph.nodes import is_quantizable, is_state, op_type
from coreai_opt.quantization._graph.resolve import Place, Placement, Planned
from coreai_opt.quantization.config.quantization_config import KVCacheQuantConfig, QuantizerConfig
from coreai_opt.quantization.spec import QuantizationSpec

__all__ = ["check_caches", "override", "warn_of_doubles"]

logger = logging.getLogger(__name__)

_ACTIVATION = CompressionTargetTensor.ACTIVATION


def override(
    graph: Graph,
    configs: NodeConfigs,
    config: QuantizerConfig,
    placement: Placement,
    holders: dict[Node, list[tuple[str, str]]],
) -> None:
    """Replace specifications: by modules' inputs and outputs, then by modules' states, then by caches.

    Args:
        graph: exported.
        configs: the model's.
        config: where they come from.
        placement: is changed.
        holders: of the nodes that read parameters and buffers, the modules and attributes that hold them.
    """
    writer = _Writer(graph, placement)
    _of_boundaries(graph, configs, writer)
    _of_states(configs, holders, writer)
    _of_caches(graph, config.kv_cache_quant_configs or {}, writer)


class _Writer:
    """Writes single places. Who shares a quantizer with the first place of all follows that place."""

    def __init__(self, graph: Graph, placement: Placement) -> None:
        self._placement = placement
        self._followers: dict[
            object, list[Place]
        ] = {}  # by a Planned, or the quantizer that is there already
        for place, planned in placement.in_order(graph):
            self._followers.setdefault(planned, []).append(place)

    def write(self, place: Place, spec: QuantizationSpec | None, target: CompressionTargetTensor) -> None:
        places = self._placement.places
        before = places.get(place)
        if spec is None:
            places.pop(place, None)
            if before is not None:
                self._followers[before].remove(place)
            return
        planned = Planned(spec, target)
        moved = [place]
        if before is not None:
            followers = self._followers[before]
            if followers[0] == place:
                moved = list(followers)
            for each in moved:
                followers.remove(each)
        self._followers[planned] = moved
        for each in moved:
            places[each] = planned


def _of_boundaries(graph: Graph, configs: NodeConfigs, writer: _Writer) -> None:
    inside: dict[str, set[Node]] = {}
    for node in graph.nodes:
        for name in configs.modules_of(node):
            inside.setdefault(name, set()).add(node)
    for name, config in configs.entries():
        nodes = inside.get(name, set())
        if config.module_input_spec:
            for index, place in enumerate(_inputs(graph, nodes)):
                _write(writer, place, lookup(config.module_input_spec, index))
        if config.module_output_spec:
            for index, place in enumerate(_outputs(graph, nodes)):
                _write(writer, place, lookup(config.module_output_spec, index))


def _write(writer: _Writer, place: Place, spec: Any) -> None:
    if spec is not MISSING and is_quantizable(place.producer):
        writer.write(place, spec, _ACTIVATION)


def _inputs(graph: Graph, inside: set[Node]) -> Iterator[Place]:
    """The edges into the module, those of parameters and buffers aside."""
    for node in graph.nodes:
        if node in inside:
            for producer in node.all_input_nodes:
                if producer not in inside and not is_state(producer):
                    yield Place(producer, node)


def _outputs(graph: Graph, inside: set[Node]) -> Iterator[Place]:
    """The nodes of the module that are read outside of it."""
    for node in graph.nodes:
        if node in inside and any(user not in inside for user in node.users):
            yield Place(node)


def _of_states(configs: NodeConfigs, holders: dict[Node, list[tuple[str, str]]], writer: _Writer) -> None:
    entries = {name: entry for name, entry in configs.entries() if entry.module_state_spec}
    by_precedence = [*reversed(list(_levels(configs)))]
    for node, places in holders.items():
        spec = MISSING
        for level in by_precedence:
            for name in level:
                if name not in entries:
                    continue
                own = [attribute for holder, attribute in places if holder == name]
                found = [lookup(entries[name].module_state_spec, attribute) for attribute in own]
                spec = next((each for each in found if each is not MISSING), MISSING)
                if spec is not MISSING:
                    break
            if spec is not MISSING:
                break
        if spec is not MISSING and is_quantizable(node):
            for reader in node.users:
                writer.write(Place(node, reader), spec, CompressionTargetTensor.WEIGHT)


def _levels(configs: NodeConfigs) -> Iterator[list[str]]:
    """Names of the modules of each level, the one that takes precedence last."""
    for level in sorted(configs.levels, key=lambda each: -each.value):
        yield list(configs.levels[level])


def check_caches(graph: Graph, config: QuantizerConfig) -> frozenset[str]:
    """The types of the operations that update caches.

    Raises:
        ValueError: there is no such operation, or it has no such input.
    """
    caches = config.kv_cache_quant_configs or {}
    for name, cache in caches.items():
        found = [node for node in graph.nodes if op_type(node) == name]
        if not found:
            types = sorted({kind for kind in map(op_type, graph.nodes) if kind is not None})
            raise ValueError(
                f"kv_cache_quant_configs: no operation of the model has the type {name!r}. Its types: {types}"
            )
        for node in found:
            count = len(node.all_input_nodes)
            if cache.quant_input_idx >= count:
                raise ValueError(
                    f"kv_cache_quant_configs[{name!r}] names input {cache.quant_input_idx}; {node.name!r} "
                    f"has {count} inputs"
                )
    return frozenset(caches)


def _of_caches(graph: Graph, caches: dict[str, KVCacheQuantConfig], writer: _Writer) -> None:
    for node in graph.nodes:
        cache = caches.get(op_type(node) or "")
        if cache is None:
            continue
        specs = cache.op_quantizer_config.op_input_spec or {}
        writer.write(Place(node), None, _ACTIVATION)
        for index, producer in enumerate(node.all_input_nodes):
            spec = specs[index] if index == cache.quant_input_idx else None
            writer.write(Place(producer, node), spec, _ACTIVATION)


def warn_of_doubles(config: QuantizerConfig) -> None:
    """Warn, in the log, of operations that are configured as caches and by their type."""
    named = (*config.module_type_configs.values(), *config.module_name_configs.values())
    entries = (config.global_config, *named)
    for name in config.kv_cache_quant_configs or {}:
        if any(entry is not None and name in (entry.op_type_config or {}) for entry in entries):
            logger.warning(
                f"{name!r} is in kv_cache_quant_configs and in an op_type_config: the former holds"
            )
