"""Quantized checkpoints, as serving stacks have them, into models that are trained on."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from coreai_opt.export.checkpoint_config import check_configuration
from coreai_opt.export.checkpoints import CONFIG_KEY, METHOD
from coreai_opt.export.compressed_tensors import NVFP4, decoded, parameters_of
from coreai_opt.export.parametrized import slots_of
from coreai_opt.quantization import ModuleQuantizerConfig, QuantizerConfig
from coreai_opt.quantization.config import ExecutionMode
from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity, QuantizationSpec
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["load_checkpoint", "load_quantization", "read_dense"]


@dataclass(frozen=True)
class _Layer:
    """A layer in a checkpoint: its tensors by their names in it, and its group of the configuration."""

    tensors: dict[str, Tensor]
    format: str
    group: Mapping[str, Any]


def load_checkpoint(model: nn.Module, path: str | Path) -> QuantizerConfig:
    """Load a checkpoint with quantized weights into a model as dense ones.

    To go on training, prepare the model with the configuration that is returned; then
    :func:`load_quantization` brings the scales of the checkpoint::

        config = load_checkpoint(model, folder)
        model = Quantizer(model, config).prepare(example_inputs)
        load_quantization(model, folder)

    Args:
        model: of the checkpoint's structure, without parametrizations; it is changed.
        path: a folder with ``config.json`` and safetensors files; or one such file, with the configuration in
            its header.

    Returns:
        A configuration that quantizes the same layers alike.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the checkpoint has no configuration of compressed-tensors, one that cannot be read, or a
            format that is unknown; or the model has parametrizations.
        RuntimeError: tensors are missing, unexpected, or of another shape. The model stays as it was.
    """
    if any(parametrize.is_parametrized(module) for module in model.modules()):
        raise ValueError("model must have no parametrizations: load the checkpoint before prepare()")
    state, layers = _read(model, Path(path))
    _load(model, {**state, **_dense(layers)})
    return QuantizerConfig(
        global_config=None,
        module_name_configs={name: _module_config(layer) for name, layer in layers.items()},
        execution_mode=ExecutionMode.EAGER,
    )


@torch.no_grad()
def load_quantization(model: nn.Module, path: str | Path) -> None:
    """Give the simulators of a prepared model the scales and zero points of a checkpoint.

    They hold until the simulators observe again, which they do in training unless
    :meth:`.Quantizer.disable_observer` is called: ranges of weights that were quantized before give other
    scales.

    Args:
        model: prepared in eager mode, with the configuration from :func:`load_checkpoint`.
        path: the checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the checkpoint has no configuration of compressed-tensors, or one that cannot be read.
        RuntimeError: a layer of the checkpoint has no simulator, or one for other blocks. The model stays as
            it was.
    """
    _, layers = _read(model, Path(path))
    weights = {slot.name: slot.simulator for slot in slots_of(model, FakeQuantizeImplBase) if slot.index == 0}
    found: list[tuple[str, FakeQuantizeImplBase, Tensor, Tensor | None]] = []
    for name, layer in layers.items():
        weight_name = f"{name}.weight".lstrip(".")
        if weight_name not in weights:
            raise RuntimeError(f"{weight_name!r} is quantized in the checkpoint, and has no simulator here")
        parameters = parameters_of(layer.tensors, layer.format, layer.group["weights"])
        found.append((weight_name, weights[weight_name], *parameters))
        if "input_scale" in layer.tensors:
            simulator = getattr(model.get_submodule(name), "linear_quantize_input", None)
            if not isinstance(simulator, FakeQuantizeImplBase):
                raise RuntimeError(f"the inputs of {name!r} are quantized in the checkpoint, and not here")
            scale, zero_point = layer.tensors["input_scale"], layer.tensors.get("input_zero_point")
            found.append((f"{name}, its inputs", simulator, scale, zero_point))
    written = [
        (simulator, _buffers(name, simulator, scale, zero_point))
        for name, simulator, scale, zero_point in found
    ]
    for simulator, buffers in written:
        for key, value in buffers.items():
            simulator.qparams_calculator.get_buffer(key).copy_(value)


def _buffers(
    name: str, simulator: FakeQuantizeImplBase, scale: Tensor, zero_point: Tensor | None
) -> dict[str, Tensor]:
    """The simulator's buffers with these parameters in them."""
    held: Tensor = simulator.calculate_qparams()[0]
    if scale.numel() != held.numel():
        raise RuntimeError(
            f"{name}: the checkpoint has {scale.numel()} scales, the simulator {held.numel()}: prepare the "
            f"model with the configuration that load_checkpoint returns"
        )
    scale = scale.reshape(held.shape).to(held.dtype)
    if "zero_point" not in simulator.qparams_calculator._buffers:
        return {"scale": scale}
    zero = torch.zeros_like(scale) if zero_point is None else zero_point.reshape(held.shape).to(held.dtype)
    minimum = (float(simulator.quant_min) - zero) * scale
    return {"scale": scale, "zero_point": zero.to(torch.int32), "minval": minimum}


def read_dense(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The dense weights of the quantized layers in a checkpoint of a model, by their names."""
    return _dense(_read(model, path)[1])


def _dense(layers: Mapping[str, _Layer]) -> dict[str, Tensor]:
    return {
        f"{name}.weight".lstrip("."): decoded(layer.tensors, layer.format, layer.group["weights"], name)
        for name, layer in layers.items()
    }


def _read(model: nn.Module, path: Path) -> tuple[dict[str, Tensor], dict[str, _Layer]]:
    """The dense tensors of a checkpoint, and its quantized layers, both by name."""
    files, config = _located(path)
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_file(file)
    by_layer: dict[str, list[str]] = {}
    for key in state:
        by_layer.setdefault(key.rpartition(".")[0], []).append(key)
    layers = {}
    for group in config["config_groups"].values():
        for name in _matched(model, group["targets"], config.get("ignore") or ()):
            keys = by_layer.get(name, ())
            parts = {key.rpartition(".")[2]: key for key in keys if not key.endswith("bias")}
            if "weight_scale" in parts and group.get("weights") and name not in layers:
                tensors = {part: state.pop(key) for part, key in parts.items()}
                layers[name] = _Layer(tensors, group.get("format") or config["format"], group)
    return state, layers


def _located(path: Path) -> tuple[list[Path], dict[str, Any]]:
    """The files with the tensors, and the configuration."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        config_file = path / "config.json"
        if not files or not config_file.is_file():
            raise FileNotFoundError(f"path: {path} has no config.json with safetensors files beside it")
        whole = json.loads(config_file.read_text())
        config = whole.get(CONFIG_KEY) if isinstance(whole, Mapping) else None
    elif path.is_file():
        files = [path]
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get(CONFIG_KEY, "null"))
    else:
        raise FileNotFoundError(f"path: there is no {path}")
    if not isinstance(config, Mapping) or config.get("quant_method") != METHOD:
        raise ValueError(f"path: {path} has no {CONFIG_KEY} of {METHOD}")
    check_configuration(config, path)
    return files, dict(config)


def _matched(model: nn.Module, targets: Iterable[str], ignore: Iterable[str]) -> Iterator[str]:
    """The modules that targets name: by their names, their classes, or, after ``re:``, patterns of names."""

    def is_meant(name: str, module: nn.Module, patterns: Iterable[str]) -> bool:
        classes = {each.__name__ for each in type(module).__mro__}
        return any(
            re.match(pattern[3:], name) is not None
            if pattern.startswith("re:")
            else pattern == name or pattern in classes
            for pattern in patterns
        )

    for name, module in model.named_modules():
        if is_meant(name, module, targets) and not is_meant(name, module, ignore):
            yield name


def _load(model: nn.Module, state: dict[str, Tensor]) -> None:
    own = model.state_dict()
    tied: dict[int, list[str]] = {}
    for name, tensor in own.items():
        tied.setdefault(tensor.data_ptr(), []).append(name)
    given = set(state)
    missing = [
        name
        for name, tensor in own.items()
        if name not in given and not (tensor.numel() and given & set(tied[tensor.data_ptr()]))
    ]
    unexpected = sorted(given - set(own))
    shapes = [
        f"{name} ({tuple(state[name].shape)}, not {tuple(own[name].shape)})"
        for name in sorted(given & set(own))
        if state[name].shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        raise RuntimeError(
            f"the checkpoint does not fit the model: missing {missing}, unexpected {unexpected}, of another "
            f"shape {shapes}"
        )
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


def _module_config(layer: _Layer) -> ModuleQuantizerConfig:
    group = layer.group
    activations = group.get("input_activations")
    inputs: dict[str | int, QuantizationSpec | None] | None = None
    if activations and not activations.get("dynamic"):
        inputs = {0: _spec(activations, layer.format)}
    return ModuleQuantizerConfig(
        op_state_spec={"weight": _spec(group["weights"], layer.format)},
        op_input_spec=inputs,
        op_output_spec=None,
    )


def _spec(arguments: Mapping[str, Any], fmt: str) -> QuantizationSpec:
    bits, strategy = int(arguments["num_bits"]), arguments.get("strategy")
    fields: dict[str, Any] = {}
    if arguments.get("type") == "float":
        fields["dtype"] = "float4_e2m1fn" if bits == 4 else "float8_e4m3fn"
        if fmt == NVFP4 and bits == 4:
            fields["scale_dtype"] = "float8_e4m3fn"
        elif arguments.get("scale_dtype"):
            fields["scale_dtype"] = "float8_e8m0fnu"
    else:
        fields["dtype"] = f"int{bits}"
        fields["qscheme"] = "symmetric" if arguments.get("symmetric", True) else "asymmetric"
    if strategy == "channel":
        fields["granularity"] = PerChannelGranularity(axis=0)
    elif strategy in ("group", "tensor_group"):
        fields["granularity"] = PerBlockGranularity(axis=1, block_size=arguments["group_size"])
    elif strategy == "block":
        fields["granularity"] = PerBlockGranularity(block_size=tuple(arguments["block_structure"]))
    return QuantizationSpec(**fields)
