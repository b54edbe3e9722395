"""From a model and a configuration to a graph module with quantizers that have seen example inputs."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from tqdm.auto import tqdm

from coreai_opt._call_inputs import Arguments
from coreai_opt._prepared_models import marks_of, with_all_names
from coreai_opt._utils.config_utils import canonical_names
from coreai_opt.common import CompressionType
from coreai_opt.quantization._eager.preparation import set_flags, simulators_of
from coreai_opt.quantization._graph.annotate import annotate
from coreai_opt.quantization._graph.attributes import attach, keep_metadata, preserved_attributes
from coreai_opt.quantization._graph.axes import complete_axes, make_shared_ones_fit
from coreai_opt.quantization._graph.configs import NodeConfigs
from coreai_opt.quantization._graph.conv_bn import scale_batch_norms
from coreai_opt.quantization._graph.earlier import EarlierQuantizers
from coreai_opt.quantization._graph.export import export_model
from coreai_opt.quantization._graph.graph_module import QuantizedGraphModule
from coreai_opt.quantization._graph.insert import build, insert, quantizer_nodes
from coreai_opt.quantization._graph.modes import follow_training_flag, use_upstream_numbers
from coreai_opt.quantization._graph.nodes import attribute_of, overload_name
from coreai_opt.quantization._graph.overrides import check_caches, override, warn_of_doubles
from coreai_opt.quantization._graph.owners import keep_owners, keep_priorities
from coreai_opt.quantization._graph.patterns import BATCH_NORM
from coreai_opt.quantization._graph.reconcile import reconcile
from coreai_opt.quantization._graph.resolve import Placement, resolve
from coreai_opt.quantization._observing import first_observations, tell_what_is_left, why_disabled
from coreai_opt.quantization.config import QuantizerConfig
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["place_quantizers", "prepare"]

# Most models take less; a large one's export may take minutes.
_SECONDS_WITHOUT_A_BAR = 2.0

logger = logging.getLogger(__name__)


def prepare(
    model: nn.Module,
    config: QuantizerConfig,
    example_inputs: Arguments,
    dynamic_shapes: Any = None,
    no_grad: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    strict_upstream: bool = False,
    left_out: dict[str, str] | None = None,
) -> GraphModule:
    """Export the model, put quantizers into the graph, and let them observe one forward.

    Args:
        model: its parameters and buffers become the graph's.
        config: what to quantize.
        example_inputs: arguments of one forward.
        dynamic_shapes: as for :func:`torch.export.export`.
        no_grad: whether to export under :class:`torch.no_grad`.
        state_dict: of a model that was prepared alike, to load.
        strict_upstream: give batch norms and dropouts the numbers of Apple's package.
        left_out: gets the parameters that have a specification and no quantizer, and why.

    Raises:
        ValueError, RuntimeError, pydantic.ValidationError: see the stages.
    """
    preserved = preserved_attributes(model, config)
    configs = NodeConfigs(model, config)
    earlier = EarlierQuantizers(model)
    with tqdm(total=3, desc="Exporting the model", delay=_SECONDS_WITHOUT_A_BAR, leave=False) as bar:
        with earlier.as_operators():
            graph_module = export_model(
                model, example_inputs.args, dynamic_shapes, no_grad, example_inputs.kwargs
            )
        earlier.take_out(graph_module)
        _next_stage(bar, "Placing quantizers")
        prepared = _with_quantizers(model, config, configs, graph_module, earlier, strict_upstream)
        _next_stage(bar, "Observing the example inputs")
        with _buffers_as_before_on_failure(model):
            masked = _observe(prepared, example_inputs, model.training, earlier)
            for _, quantizer in quantizer_nodes(prepared):
                if quantizer.is_disabled() and left_out is not None:
                    left_out[quantizer.tensor_fqn] = why_disabled(quantizer)
            _drop(prepared, masked)
            if state_dict is not None:
                _load(prepared, state_dict)
    set_flags(simulators_of(prepared), observe=False, simulate=True)
    keep_metadata(model, prepared)
    # As attributes: copies of a graph module get those that are attached, and no buffers of their own.
    attach(prepared, preserved | marks_of(CompressionType.QUANTIZATION))
    return prepared


def _next_stage(bar: Any, name: str) -> None:
    bar.set_description(name, refresh=False)
    bar.update()


def _with_quantizers(
    model: nn.Module,
    config: QuantizerConfig,
    configs: NodeConfigs,
    graph_module: GraphModule,
    earlier: EarlierQuantizers,
    strict_upstream: bool,
) -> GraphModule:
    """The exported model with its quantizers, which have seen nothing yet."""
    graph = graph_module.graph
    if any(overload_name(node) == BATCH_NORM for node in graph.nodes):
        # As Apple's package does: otherwise parameters that nothing uses stay in the state_dict.
        graph.eliminate_dead_code()
    if strict_upstream:
        use_upstream_numbers(graph)
    placement = place_quantizers(model, graph_module, configs, config)
    earlier.put_back(placement)
    scale_batch_norms(graph, placement)
    insert(graph_module, build(graph, placement))
    follow_training_flag(graph, strict_upstream)
    make_shared_ones_fit(graph_module)
    complete_axes(graph_module)
    keep_owners(graph_module, canonical_names(model))
    prepared = QuantizedGraphModule(graph_module, graph)
    _drop_unused(prepared)
    prepared.meta.update(graph_module.meta)
    _name_tensors(prepared)
    return prepared


def place_quantizers(
    model: nn.Module, graph_module: GraphModule, configs: NodeConfigs, config: QuantizerConfig
) -> Placement:
    """Decide where quantizers are, and what they are. The graph stays as it is."""
    graph = graph_module.graph
    warn_of_doubles(config)
    caches = check_caches(graph, config)
    holders = _holders(model, graph_module)
    names = {node: {attribute for _, attribute in places} for node, places in holders.items()}
    annotations = annotate(graph, configs, names, caches)
    reconcile(graph, annotations)
    placement = resolve(graph, annotations.slots)
    override(graph, configs, config, placement, holders)
    keep_priorities(annotations.nodes)
    return placement


def _holders(model: nn.Module, graph_module: GraphModule) -> dict[Node, list[tuple[str, str]]]:
    """Of the nodes that read tensors of the model, the modules and attributes that hold these."""
    places: dict[int, list[tuple[str, str]]] = {}
    for name, module in model.named_modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                places.setdefault(id(tensor), []).append((name, attribute))
    found = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            tensor = attribute_of(graph_module, node)
            found[node] = places.get(id(tensor), [])
            # torch.export gives these nodes no value.
            if isinstance(tensor, Tensor):
                node.meta.setdefault("val", torch.empty_like(tensor, device="meta"))
    return found


def _drop_unused(prepared: GraphModule) -> None:
    """Take out what has no effect on outputs: nodes, and modules and quantizers that no node uses."""
    prepared.graph.eliminate_dead_code()
    prepared.delete_all_unused_submodules()
    used = {id(quantizer) for _, quantizer in quantizer_nodes(prepared)}
    # Of a shared one all names stay, as in Apple's package; torch leaves some where it is not used at all.
    for name, module in list(prepared._modules.items()):
        if isinstance(module, FakeQuantizeImplBase) and id(module) not in used:
            delattr(prepared, name)
    prepared.recompile()


def _name_tensors(prepared: GraphModule) -> None:
    for node, quantizer in quantizer_nodes(prepared):
        source = node.all_input_nodes[0]
        if source.op == "get_attr":
            quantizer.tensor_fqn = str(source.target)


@contextmanager
def _buffers_as_before_on_failure(model: nn.Module) -> Iterator[None]:
    """If the block raises, what a forward wrote into the model's buffers is undone."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for buffer, values in before:
                buffer.copy_(values)
        raise


def _observe(
    prepared: GraphModule, example_inputs: Arguments, training: bool, earlier: EarlierQuantizers
) -> dict[FakeQuantizeImplBase, bool]:
    """Run the example; the quantizers that have seen masks."""
    set_flags(simulators_of(prepared), observe=True, simulate=False)
    # These have seen the data that they were trained on.
    set_flags(earlier.quantizers, observe=False, simulate=False)
    prepared.eval()
    with torch.no_grad(), first_observations(prepared) as masked:
        prepared(*example_inputs.args, **example_inputs.kwargs)
    prepared.train(training)
    return masked


def _drop(prepared: GraphModule, masked: dict[FakeQuantizeImplBase, bool]) -> None:
    """Take out the quantizers whose blocks do not fit their tensor, and those of masks."""
    disabled = [
        node
        for node, quantizer in quantizer_nodes(prepared)
        if quantizer.is_disabled() or quantizer in masked
    ]
    tell_what_is_left(
        (str(node.target), masked[quantizer])
        for node, quantizer in quantizer_nodes(prepared)
        if quantizer in masked
    )
    for node in disabled:
        node.replace_all_uses_with(node.all_input_nodes[0])
        prepared.graph.erase_node(node)
        delattr(prepared, str(node.target))
    if disabled:
        prepared.recompile()


def _load(prepared: GraphModule, state_dict: Mapping[str, Tensor]) -> None:
    state_dict = with_all_names(prepared, state_dict)
    own = prepared.state_dict()
    problems = [f"missing key {key!r}" for key in own if key not in state_dict]
    problems += [f"unexpected key {key!r}" for key in state_dict if key not in own]
    problems += [
        f"{key!r} has shape {tuple(state_dict[key].shape)}, not {tuple(tensor.shape)}"
        for key, tensor in own.items()
        if key in state_dict and state_dict[key].shape != tensor.shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise RuntimeError(
            f"the state_dict is not that of a model prepared alike: {shown}. Prepare with the configuration, "
            f"the model and inputs of the shapes that it was saved with."
        )
    prepared.load_state_dict(state_dict, strict=True)
    empty = [
        str(node.target)
        for node, quantizer in quantizer_nodes(prepared)
        if not quantizer.is_stateless and quantizer.calculate_qparams()[0].numel() == 0
    ]
    if empty:
        raise RuntimeError(
            f"the state_dict holds no parameters for the quantizers {empty}: it was saved before they saw "
            f"data"
        )
