"""ONNX files: weights as integers with DequantizeLinear, activations as pairs with QuantizeLinear."""

import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.export.files import Job
from coreai_opt.export.onnx_program import (
    DEFAULT_OPSET,
    FIRST_OPSET_OF_4_BITS,
    exported,
    require_onnx,
    write_program,
)
from coreai_opt.export.parametrized import FinalizedWeight
from coreai_opt.export.records import Affine, QuantizedActivation

__all__ = ["OnnxActivation", "OnnxWeight", "check", "run", "write"]

_OPTIONS = ("opset",)
_FIRST_OPSET_OF_BLOCKS = 21
# ONNX's numbers of the types that torch lacks.
_UINT4, _INT4 = 21, 22
# What ONNX Runtime calls its quantization of float weights between quantized activations.
_QUANTIZES_WEIGHTS = "WeightBiasQuantization"
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def _onnx_type(dtype: torch.dtype, name: str) -> Any:
    """What holds the values in ONNX: a dtype of torch, or one of ONNX's numbers.

    Raises:
        ValueError: nothing does.
    """
    if dtype in _FLOAT8:
        return dtype
    label = str(dtype).removeprefix("torch.")
    if dtype.is_floating_point or "int" not in label:
        raise ValueError(f"{name!r} is quantized to {dtype}; ONNX has integers of 4 and 8 bits, and float8")
    bits, signed = int(label.rpartition("int")[2]), not label.startswith("uint")
    if bits > 4:
        return torch.int8 if signed else torch.uint8
    return _INT4 if signed else _UINT4


class OnnxWeight(FinalizedWeight):
    """A weight that is stored as its quantized values.

    Args:
        record: the quantized weight.
        name: its qualified name, for messages.

    Raises:
        ValueError: ONNX cannot express it.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, record: Affine, name: str) -> None:
        super().__init__()
        if record.minval is not None:
            raise ValueError(f"{name!r} has the formulation 'minval'; ONNX has zero points: use 'zp'")
        self.stored_type = _onnx_type(record.dtype, name)
        self.output_dtype = record.output_dtype
        scale = record.scale.to(record.output_dtype)
        zero_point = record.zero_point
        if zero_point is None:
            zero_point = torch.zeros(scale.shape, dtype=record.values.dtype)
        scale, zero_point, self.attributes = _in_onnx_form(record.values.shape, scale, zero_point)
        self.register_buffer("values", record.values)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    @property
    def needed_opset(self) -> int:
        """The first opset that has all of this."""
        is_new = self.stored_type in (_INT4, _UINT4) or "block_size" in self.attributes
        return max(FIRST_OPSET_OF_4_BITS, _FIRST_OPSET_OF_BLOCKS) if is_new else 0

    def forward(self, _: Tensor | None = None) -> Tensor:
        """DequantizeLinear. Only for export: elsewhere the operator computes nothing."""
        symbolic = torch.onnx.ops.symbolic
        values, zero_point = self.values, self.zero_point
        if not isinstance(self.stored_type, torch.dtype):  # they become constants of this type in the file
            values, zero_point = (
                symbolic("Cast", (each,), {"to": self.stored_type}, dtype=self.stored_type, shape=each.shape)
                for each in (values, zero_point)
            )
        operands = (values, self.scale, zero_point)
        shape = self.values.shape
        return symbolic("DequantizeLinear", operands, self.attributes, dtype=self.output_dtype, shape=shape)


def _in_onnx_form(
    shape: torch.Size, scale: Tensor, zero_point: Tensor
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Parameters of blocks as DequantizeLinear takes them: one, one a channel, or blocks along one axis."""
    grid = scale.shape
    blocked = [axis for axis, count in enumerate(grid) if count > 1]
    if not blocked:
        return scale.reshape(()), zero_point.reshape(()), {}
    if len(blocked) == 1 and grid[blocked[0]] == shape[blocked[0]]:
        return scale.reshape(-1), zero_point.reshape(-1), {"axis": blocked[0]}
    # Along the axis of the largest blocks they stay; along the others each element gets its parameters.
    axis = max(blocked, key=lambda each: shape[each] // grid[each])
    for other in range(len(shape)):
        if other != axis:
            repeats = shape[other] // grid[other]
            scale, zero_point = (each.repeat_interleave(repeats, other) for each in (scale, zero_point))
    return scale, zero_point, {"axis": axis, "block_size": shape[axis] // grid[axis]}


class OnnxActivation(nn.Module):
    """A pair of QuantizeLinear and DequantizeLinear, after a clamp where the range is narrower than the type.

    Args:
        record: how the activation is quantized.
        name: the simulator's qualified name, for messages.

    Raises:
        ValueError: ONNX cannot express it.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, record: QuantizedActivation, name: str) -> None:
        super().__init__()
        if record.minval is not None:
            raise ValueError(f"{name!r} has the formulation 'minval'; ONNX has zero points: use 'zp'")
        if record.dtype not in (torch.int8, torch.uint8):
            # ONNX Runtime 1.31 refuses float8: it fuses the pair with a product that has no such type.
            raise ValueError(
                f"the activation {name!r} is quantized to {record.dtype}; for ONNX, use int8 or uint8"
            )
        self.dtype = record.dtype
        self.attributes: dict[str, Any] = {} if record.axis is None else {"axis": record.axis}
        self.register_buffer("scale", record.scale)
        self.register_buffer("zero_point", record.zero_point)
        self.register_buffer("lowest", record.lowest)

    def forward(self, tensor: Tensor) -> Tensor:
        """The pair. Only for export: elsewhere the operators compute nothing."""
        symbolic = torch.onnx.ops.symbolic
        lowest = self._buffers["lowest"]
        if lowest is not None:
            shape = [1] * tensor.dim()
            if self.attributes:
                shape[self.attributes["axis"]] = -1
            tensor = torch.maximum(tensor, lowest.reshape(shape))
        parameters = (self.scale, self.zero_point)
        quantized = symbolic(
            "QuantizeLinear", (tensor, *parameters), self.attributes, dtype=self.dtype, shape=tensor.shape
        )
        return symbolic(
            "DequantizeLinear",
            (quantized, *parameters),
            self.attributes,
            dtype=tensor.dtype,
            shape=tensor.shape,
        )


def check(job: Job) -> None:
    """Raise unless the model can be converted, as far as that is known before.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: an option is unknown, or the opset has not what the model needs.
    """
    require_onnx("onnx", "onnxscript", "onnxruntime")
    unknown = sorted(set(job.options) - set(_OPTIONS))
    if unknown or job.half:
        raise ValueError(f"there are no options {unknown + ['half'] * job.half} for .onnx; there is 'opset'")
    needed = _needed_opset(job.model)
    if _opset(job) < needed:
        raise ValueError(
            f"opset: integers of 4 bits and blocks need {needed} or later; got {job.options['opset']}"
        )


def _needed_opset(model: nn.Module) -> int:
    modules = (each for each in model.modules() if isinstance(each, OnnxWeight))
    return max((each.needed_opset for each in modules), default=0)


def _opset(job: Job) -> int:
    given = job.options.get("opset")
    if given is None:
        return max(DEFAULT_OPSET, _needed_opset(job.model))
    if isinstance(given, bool) or not isinstance(given, int):
        raise ValueError(f"opset must be an int; got {given!r}")
    return given


def write(job: Job, path: Path) -> None:
    """Convert the model, whose quantizers are ONNX's, and write it. ValueError if its opset is another."""
    opset = _opset(job)
    program = exported(job.model, job.args, {}, opset, job.input_names, job.output_names, job.dynamic_shapes)
    # Where the exporter cannot convert to the opset that is asked for, it logs that, and returns its own.
    made = program.opset_imports.get("")
    if made != opset:
        raise ValueError(f"opset: the exporter cannot write this model with {opset}; it can with {made}")
    _pack(program, importlib.import_module("onnx_ir"))
    _warn_of_float_weights(program)
    write_program(program, path)


def _warn_of_float_weights(program: Any) -> None:
    """Tell which weights ONNX Runtime would quantize itself, though the file does not."""
    found = []
    for node in program.graph:
        if node.op_type not in ("Gemm", "MatMul", "Conv", "ConvTranspose"):
            continue
        tensor, weight = node.inputs[:2]
        producer, consumers = tensor.producer(), [use.node.op_type for use in node.outputs[0].uses()]
        is_float = weight.const_value is not None
        of_input = None if producer is None else producer.op_type
        has_both = of_input == "DequantizeLinear" and set(consumers) == {"QuantizeLinear"}
        if is_float and has_both:
            found.append(weight.name)
    if found:
        warnings.warn(
            f"inputs and outputs of layers are quantized, but not their weights {found}: ONNX Runtime "
            f"quantizes these to 8 bits by itself, unless InferenceSession(..., "
            f"disabled_optimizers=['{_QUANTIZES_WEIGHTS}']) tells it not to",
            UserWarning,
            stacklevel=4,
        )


def _pack(model: Any, ir: Any) -> None:
    """Store integers of 4 bits as such where the exporter has stored bytes and a cast."""
    for node in list(model.graph):
        if node.op_type != "Cast" or node.inputs[0] is None:
            continue
        to = ir.DataType(node.attributes["to"].value)
        source_value = node.inputs[0]
        source = source_value.const_value
        if source is None or to not in (ir.DataType.INT4, ir.DataType.UINT4):
            continue
        values = source.numpy().astype(to.numpy())
        packed = ir.Value(name=node.outputs[0].name, const_value=ir.Tensor(values, dtype=to))
        packed.shape, packed.dtype = ir.Shape(values.shape), to
        node.outputs[0].name = f"{packed.name}_cast"
        model.graph.register_initializer(packed)
        ir.convenience.replace_all_uses_with(node.outputs[0], packed)
        model.graph.remove(node, safe=True)
        if not source_value.uses():
            del model.graph.initializers[source_value.name]


def run(job: Job, path: Path) -> list[Tensor]:
    """What ONNX Runtime computes for the example."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    # Pairs and products one by one: what the file says. Fused, CPUs that lack an instruction for it saturate
    # sums of products of 8-bit integers.
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = runtime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=[_QUANTIZES_WEIGHTS]
    )
    feeds = {each.name: tensor.numpy() for each, tensor in zip(session.get_inputs(), job.inputs, strict=True)}
    return [torch.from_numpy(each) for each in session.run(None, feeds)]
