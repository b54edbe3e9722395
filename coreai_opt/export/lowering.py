"""Models that are to be written, with their simulators replaced by what a kind of file holds."""

import torch
from torch import nn
from torch.fx import GraphModule

from coreai_opt.common import ExportBackend
from coreai_opt.export.onnx import OnnxActivation, OnnxWeight
from coreai_opt.export.parametrized import FinalizedWeight, replace_simulator, slots_of
from coreai_opt.export.torch import fold
from coreai_opt.palettization.kmeans._export import finalize_palettes
from coreai_opt.palettization.kmeans.kmeans_fake_palettize import _KMeansFakePalettize
from coreai_opt.pruning._export import finalize_pruned
from coreai_opt.pruning.spec.prune import PruneImplBase
from coreai_opt.quantization._export import activations_of, finalize_eager, observed_dtype
from coreai_opt.quantization._export_checks import check_observed
from coreai_opt.quantization._export_graph import finalize_graph, observed_dtype_of
from coreai_opt.quantization._export_records import affine_weight, is_weight, quantized_activation
from coreai_opt.quantization._graph.finalize import (
    finalized_copy,
    fold_weights,
    quantized_activations,
    quantized_weights,
)
from coreai_opt.quantization._graph.nodes import attribute_of
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["finalized_for", "is_finalized_for_core_ai", "lowered_to_onnx"]


def is_finalized_for_core_ai(model: nn.Module) -> bool:
    """Whether the model holds weights, or runs operators, as Core AI has them."""
    if any(isinstance(module, FinalizedWeight) for module in model.modules()):
        return True
    return isinstance(model, GraphModule) and any(
        str(node.target).startswith("coreai.") for node in model.graph.nodes
    )


def finalized_for(model: nn.Module, backend: ExportBackend) -> nn.Module:
    """The model finalized by each of the compressors that have prepared it; changed in place or new."""
    simulated = any(isinstance(module, FakeQuantizeImplBase) for module in model.modules())
    if backend is ExportBackend.Torch:
        if isinstance(model, GraphModule) and simulated:
            model = finalized_copy(model)
            fold_weights(model)
        for kind in (FakeQuantizeImplBase, _KMeansFakePalettize, PruneImplBase):
            fold(model, kind)
        return model
    if isinstance(model, GraphModule) and simulated:
        return finalize_graph(model, backend)
    if simulated:
        finalize_eager(model, backend)
    if next(slots_of(model, _KMeansFakePalettize), None) is not None:
        finalize_palettes(model, backend)
    if next(slots_of(model, PruneImplBase), None) is not None:
        finalize_pruned(model, backend)
    return model


@torch.no_grad()
def lowered_to_onnx(model: nn.Module) -> nn.Module:
    """The model with ONNX's operators in the place of quantizers, and dense weights elsewhere.

    Raises:
        ValueError: ONNX cannot express how a tensor is quantized.
        NotImplementedError: parameters depend on the input.
        RuntimeError: a quantizer has observed nothing.
    """
    if isinstance(model, GraphModule):
        return _graph_to_onnx(model)
    weights = [slot for slot in slots_of(model, FakeQuantizeImplBase) if is_weight(slot.simulator)]
    activations = list(activations_of(model))
    check_observed([(slot.name, slot.simulator) for slot in weights])
    check_observed([(name, getattr(module, child)) for module, child, name in activations])
    for slot in weights:
        if not isinstance(slot.simulator, FakeQuantizeImplBase):
            continue  # the second owner of a tied weight
        replace_simulator(slot, OnnxWeight(affine_weight(slot.simulator, slot.value(), slot.name), slot.name))
    for module, child, name in activations:
        simulator = getattr(module, child)
        record = quantized_activation(simulator, observed_dtype(simulator, module))
        setattr(module, child, OnnxActivation(record, name))
    for kind in (_KMeansFakePalettize, PruneImplBase):
        fold(model, kind)
    return model


def _graph_to_onnx(prepared: GraphModule) -> GraphModule:
    model = finalized_copy(prepared)
    weights, activations = list(quantized_weights(model)), list(quantized_activations(model))
    check_observed([(weight.name, weight.quantizer) for weight in weights])
    check_observed([(node.name, simulator) for node, simulator in activations])
    for weight in weights:
        tensor = attribute_of(model, weight.source)
        assert isinstance(tensor, torch.Tensor)
        name = f"{weight.name.replace('.', '_')}_{weight.node.name}"
        model.add_submodule(
            name, OnnxWeight(affine_weight(weight.quantizer, tensor, weight.name), weight.name)
        )
        weight.node.target = name
        weight.node.args = ()
    for node, simulator in activations:
        name = f"{node.name}_pair"
        record = quantized_activation(simulator, observed_dtype_of(node))
        model.add_submodule(name, OnnxActivation(record, node.name))
        node.target = name
    model.graph.eliminate_dead_code()
    model.recompile()
    return model
