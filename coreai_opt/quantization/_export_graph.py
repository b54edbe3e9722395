"""Quantized models, prepared in graph mode, for Core AI and Core ML."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from coreai_opt.common import CoreMLExportError, ExportBackend
from coreai_opt.export import coreai, coreml, mapped
from coreai_opt.export.records import QuantizedActivation
from coreai_opt.quantization._export_caches import quantize_caches
from coreai_opt.quantization._export_checks import Named, check_exportable
from coreai_opt.quantization._export_records import affine_weight, quantized_activation
from coreai_opt.quantization._export_utils import graph_activation_export_handler
from coreai_opt.quantization._graph.finalize import (
    QuantizedWeight,
    finalized_copy,
    fold_weights,
    quantized_activations,
    quantized_weights,
)
from coreai_opt.quantization._graph.folding import own_tensor
from coreai_opt.quantization._graph.nodes import attribute_of, tensor_of
from coreai_opt.quantization.config.quantization_config import KVCacheQuantConfig
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["finalize_graph", "observed_dtype_of"]


def finalize_graph(
    prepared: GraphModule,
    backend: ExportBackend,
    mmap_dir: str | Path | None = None,
    caches: Mapping[str, KVCacheQuantConfig] | None = None,
) -> GraphModule:
    """A graph module of its own that holds what the backend reads; the prepared one stays as it is.

    Args:
        prepared: prepared in graph mode.
        backend: Core AI or Core ML.
        mmap_dir: see :meth:`.Quantizer.finalize`.
        caches: how caches are quantized, by the type of the operation that updates them.

    Raises:
        As :meth:`.Quantizer.finalize`; ValueErrors about single tensors are causes of a RuntimeError.
    """
    if caches and backend is ExportBackend.CoreML:
        raise NotImplementedError("finalize: kv_cache_quant_configs are for ExportBackend.CoreAI and Torch")
    if mmap_dir is not None:
        mapped.check(prepared, mmap_dir)
    model = finalized_copy(prepared)
    named = list(_named(model))
    if not named:
        raise ValueError("finalize: nothing is quantized: the configuration matches no tensor of the model")
    try:
        check_exportable(named, backend)
    except CoreMLExportError:
        raise
    except ValueError as error:
        raise RuntimeError(str(error)) from error
    if backend is ExportBackend.CoreAI:
        _to_core_ai(model, mmap_dir)
        quantize_caches(model, caches or {})
    else:
        _to_core_ml(model)
    model.graph.eliminate_dead_code()
    used = {str(node.target) for node in model.graph.nodes if node.op == "call_module"}
    for name, module in list(model._modules.items()):
        if isinstance(module, FakeQuantizeImplBase) and name not in used:
            delattr(model, name)
    model.recompile()
    return model


def _named(model: GraphModule) -> Iterator[Named]:
    for weight in quantized_weights(model):
        yield weight.name, weight.quantizer, _tensor(model, weight).shape
    for node, simulator in quantized_activations(model):
        yield node.name, simulator, None


def _tensor(model: GraphModule, weight: QuantizedWeight) -> Tensor:
    found = attribute_of(model, weight.source)
    assert isinstance(found, Tensor)
    return found


def _to_core_ai(model: GraphModule, mmap_dir: str | Path | None) -> None:
    coreai.require_operators()
    weights, activations = list(quantized_weights(model)), list(quantized_activations(model))
    buffers: dict[tuple[str, FakeQuantizeImplBase], dict[str, str]] = {}
    with mapped.folder(mmap_dir) as folder:
        for weight in weights:
            key = (weight.name, weight.quantizer)
            if key not in buffers:
                buffers[key] = _register_weight(model, weight, folder)
            _dequantize_weight(model, weight, buffers[key])
    for node, simulator in activations:
        handler = graph_activation_export_handler(simulator)
        if handler is not None:
            handler(model, node, simulator)
            continue
        _quantize_activation(model, node, quantized_activation(simulator, observed_dtype_of(node)))
    _free_dense(model, {weight.name for weight in weights})


def _register_weight(model: GraphModule, weight: QuantizedWeight, folder: mapped.Folder) -> dict[str, str]:
    """Put the weight's compressed form into buffers of the model; their names, by what they are."""
    stem = weight.name.replace(".", "_")
    constant: Any = coreai.weight_module(affine_weight(weight.quantizer, _tensor(model, weight)), weight.name)
    if hasattr(model, f"{stem}_quantized"):  # quantized in two ways
        stem = weight.node.name
    holder = nn.Module()
    names = {}
    for part, buffer in constant.named_buffers():
        names[part] = f"{stem}_{'quantized' if part == 'quantized_data' else part}"
        holder.register_buffer(names[part], buffer)
    for name, buffer in folder.moved(holder, stem).named_buffers():
        model.register_buffer(name, buffer)
    return {**names, "input_dtype": constant.input_dtype, "output_dtype": constant.output_dtype}


def _dequantize_weight(model: GraphModule, weight: QuantizedWeight, buffers: dict[str, Any]) -> None:
    graph, node = model.graph, weight.node
    with graph.inserting_before(node):
        reads = [
            graph.get_attr(buffers[part]) if part in buffers else None
            for part in ("quantized_data", "scale", "zero_point", "minval")
        ]
        extra = {} if buffers["output_dtype"] is None else {"output_dtype": buffers["output_dtype"]}
        operator = torch.ops.coreai.constexpr_blockwise_shift_scale.default
        new = graph.call_function(operator, (*reads, buffers["input_dtype"]), extra)
    _replace(model, node, new)


def _quantize_activation(model: GraphModule, node: Node, record: QuantizedActivation) -> None:
    graph = model.graph
    source = node.all_input_nodes[0]
    observed = tensor_of(source)
    rank = 0 if observed is None else observed.dim()
    with graph.inserting_before(node):
        offsets = {}
        scale = _buffer(model, f"{node.name}_scale", record.scale)
        for part in ("zero_point", "minval"):
            value = getattr(record, part)
            if value is not None:
                offsets[part] = _buffer(model, f"{node.name}_{part}", value)
        operators = {"lowest": torch.ops.aten.maximum.default, "highest": torch.ops.aten.minimum.default}
        for part, operator in operators.items():
            limit = getattr(record, part)
            if limit is not None:
                shape = [1] * rank
                if record.axis is not None:
                    shape[record.axis] = limit.numel()
                bound = _buffer(model, f"{node.name}_{part}", limit.reshape(shape))
                source = graph.call_function(operator, (source, bound))
        axis = {} if record.axis is None else {"axis": record.axis}
        quantized = graph.call_function(
            torch.ops.coreai.quantize.default, (source, scale, record.dtype), {**offsets, **axis}
        )
        logical = {} if record.dtype.is_floating_point else {"input_dtype": record.dtype}
        new = graph.call_function(
            torch.ops.coreai.dequantize.default,
            (quantized, scale),
            {**offsets, **logical, "output_dtype": record.output_dtype, **axis},
        )
    _replace(model, node, new)


def observed_dtype_of(node: Node) -> torch.dtype:
    """The dtype of what the quantizer of a node observes."""
    observed = tensor_of(node.all_input_nodes[0])
    return torch.float32 if observed is None else observed.dtype


def _buffer(model: GraphModule, name: str, value: Tensor) -> Node:
    model.register_buffer(name, value)
    return model.graph.get_attr(name)


def _replace(model: GraphModule, node: Node, new: Node) -> None:
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    model.graph.erase_node(node)


def _free_dense(model: GraphModule, names: set[str]) -> None:
    """Let the dense weights go that nothing reads any more."""
    model.graph.eliminate_dead_code()
    read = {id(attribute_of(model, node)) for node in model.graph.nodes if node.op == "get_attr"}
    for name in names:
        owner, _, attribute = name.rpartition(".")
        tensor = getattr(model.get_submodule(owner), attribute)
        if id(tensor) not in read:
            empty = tensor.detach().new_empty(0)
            is_parameter = isinstance(tensor, nn.Parameter)
            own_tensor(model, name, nn.Parameter(empty, requires_grad=False) if is_parameter else empty)


def _to_core_ml(model: GraphModule) -> None:
    metadata = {
        weight.name: coreml.metadata_of(affine_weight(weight.quantizer, _tensor(model, weight)), weight.name)
        for weight in quantized_weights(model)
    }
    for node, simulator in list(quantized_activations(model)):
        record = quantized_activation(simulator, observed_dtype_of(node))
        name = f"_mil_act_quant_{node.name}"
        model.add_submodule(
            name,
            coreml.activation_module(record, simulator.calculate_qparams()[0].shape).train(model.training),
        )
        node.target = name
    fold_weights(model)
    for name, each in metadata.items():
        owner, _, attribute = name.rpartition(".")
        coreml.add_metadata(model.get_submodule(owner), attribute, each)
    coreml.mark(model)
