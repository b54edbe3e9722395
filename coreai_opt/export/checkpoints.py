"""Checkpoints that serving stacks read: quantized weights in safetensors, and a configuration."""

import copy
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import parametrize

from coreai_opt.export.compressed_tensors import PACKED, stored
from coreai_opt.export.parametrized import Slot, slots_of
from coreai_opt.export.tensor_stream import write_tensors
from coreai_opt.quantization._export import activations_of
from coreai_opt.quantization._export_checks import check_observed
from coreai_opt.quantization._export_records import affine_weight, is_weight, quantized_activation
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["CONFIG_KEY", "METHOD", "Content", "save_checkpoint", "without_ties"]

CONFIG_KEY = "quantization_config"
"""Where the configuration is: in ``config.json`` of a folder, and in the header of a single file."""

METHOD = "compressed-tensors"
"""What the configuration calls the formats."""
_INPUT = "linear_quantize_input"
_WEIGHTS_FILE = "model.safetensors"
# The most bytes of a header for a tensor's entry, a layer's own group, both without names, and for the rest.
_ENTRY, _GROUP, _HEADER = 96, 640, 512
# The most tensors of a layer: packed, scale, zero point, shape; or scale and zero point of the inputs.
_MOST_OF_A_LAYER = 4


class Content:
    """What a checkpoint of a model holds. The model stays as it is.

    Args:
        model: prepared by a quantizer in eager mode, or by other compressors, whose weights are stored dense.
        ignore: names of modules whose quantized weights are stored dense, too.

    Raises:
        ValueError: compressed-tensors cannot hold a tensor's quantization, or a name is unknown.
        NotImplementedError: parameters depend on the input.
        RuntimeError: a quantizer has observed nothing.
    """

    def __init__(self, model: nn.Module, ignore: Iterable[str] = ()) -> None:
        if isinstance(model, GraphModule):
            raise ValueError(
                "model is a graph: checkpoints hold the weights of layers by their names. Prepare it in "
                "eager mode, execution_mode='eager'; .pt2, .onnx, .aimodel and .mlpackage hold graphs"
            )
        ignored = set(ignore)
        unknown = ignored - {name for name, _ in model.named_modules()}
        if unknown:
            raise ValueError(f"ignore: the model has no modules {sorted(unknown)}")
        self._model = model
        self._weights = [
            slot
            for slot in slots_of(model, FakeQuantizeImplBase)
            if is_weight(slot.simulator) and slot.module_name not in ignored
        ]
        with torch.no_grad():
            self._inputs = _inputs(model, self._weights, ignored)
        check_observed([(slot.name, slot.simulator) for slot in self._weights])
        for slot in self._weights:
            _check_slot(slot, self._weights)
        self._groups: dict[str, dict[str, Any]] = {}

    def header_size(self, with_configuration: bool) -> int:
        """Bytes that are enough for the header of a file with all tensors."""
        slots = [slot.name for slot in self._weights]
        of_layers = [name for name in slots for _ in range(_MOST_OF_A_LAYER)]
        names = {*self._dense(), *_parametrized(self._model)}.difference(slots)
        size = _HEADER + sum(_ENTRY + len(json.dumps(name)) for name in (*names, *of_layers))
        return size + with_configuration * sum(_GROUP + 2 * len(json.dumps(name)) for name in slots)

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors by name. Those of a quantized layer are made when they are asked for."""
        yield from without_ties(self._dense()).items()
        quantized = {slot.name for slot in self._weights}
        for name, (module, attribute) in _parametrized(self._model).items():
            if name not in quantized:
                yield name, _evaluated(module, attribute)
        self._groups.clear()
        for slot in self._weights:
            for key, tensor in self._layer(slot).items():
                yield f"{slot.module_name}.{key}".lstrip("."), tensor

    def _dense(self) -> dict[str, Tensor]:
        simulators = [
            name for name, module in self._model.named_modules() if isinstance(module, FakeQuantizeImplBase)
        ]
        return {
            name: tensor
            for name, tensor in self._model.state_dict().items()
            if ".parametrizations." not in f".{name}"
            and not any(name.startswith(f"{each}.") for each in simulators)
        }

    def _layer(self, slot: Slot) -> dict[str, Tensor]:
        record = affine_weight(slot.simulator, slot.value(), slot.name)
        layer = stored(record, slot.name, slot.module_name in self._inputs)
        tensors, arguments = self._inputs.get(slot.module_name, ({}, None))
        group = {
            "weights": layer.arguments,
            "input_activations": arguments,
            "output_activations": None,
            "format": layer.format,
        }
        key = json.dumps(group, sort_keys=True)
        self._groups.setdefault(key, {**group, "targets": []})["targets"].append(slot.module_name)
        return {**layer.tensors, **tensors}

    def configuration(self) -> dict[str, Any]:
        """The configuration that belongs to the tensors, once all of them were asked for."""
        return _configuration(list(self._groups.values()))


def _parametrized(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    return {
        f"{module_name}.{attribute}".lstrip("."): (module, attribute)
        for module_name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for attribute in module.parametrizations  # type: ignore[union-attr]
    }


def _evaluated(module: nn.Module, attribute: str) -> Tensor:
    chain: Any = module.parametrizations[attribute]  # type: ignore[index]
    was_training = chain.training
    chain.eval()
    try:
        return getattr(module, attribute).detach()  # type: ignore[no-any-return]
    finally:
        chain.train(was_training)


def _check_slot(slot: Slot, weights: list[Slot]) -> None:
    if not isinstance(slot.module, nn.Linear | nn.Embedding) or slot.attribute != "weight":
        raise ValueError(
            f"{slot.name!r} belongs to a {type(slot.module).__bases__[0].__name__}; compressed-tensors "
            f"holds the weights of Linear and Embedding. ignore=[{slot.module_name!r}] stores it dense"
        )
    owners = [each.module_name for each in weights if each.simulator is slot.simulator]
    if len(owners) > 1:
        raise ValueError(
            f"{slot.name!r} is shared by the modules {owners}; a checkpoint holds shared weights once, "
            f"which compressed-tensors cannot express. ignore={owners} stores it dense"
        )


def _inputs(
    model: nn.Module, weights: list[Slot], ignored: set[str]
) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """For each layer with quantized inputs, tensors and configuration of these."""
    layers = {slot.module_name for slot in weights if isinstance(slot.module, nn.Linear)}
    found = {}
    for module, child, name in activations_of(model):
        owner = name.rpartition(".")[0]
        if owner in ignored:
            continue
        simulator = getattr(module, child)
        check_observed([(name, simulator)])
        record = quantized_activation(simulator, torch.float32)
        is_float8 = record.dtype == torch.float8_e4m3fn and record.scale.dtype == torch.float32
        if child != _INPUT or owner not in layers or record.axis is not None or record.minval is not None:
            raise ValueError(
                f"the activation {name!r} cannot be stored: compressed-tensors holds parameters per tensor "
                f"of the inputs of quantized Linear layers, with zero points"
            )
        if record.dtype not in (torch.int8, torch.uint8) and not is_float8:
            raise ValueError(
                f"the activation {name!r} has the dtype {record.dtype}: use int8 or float8_e4m3fn"
            )
        tensors = {"input_scale": record.scale.reshape(1)}
        symmetric = True
        if record.zero_point is not None:
            shift = 128 if record.dtype == torch.uint8 else 0
            zero_point = (record.zero_point.to(torch.int16) - shift).to(torch.int8).reshape(1)
            symmetric = not zero_point.any()
            if not symmetric:
                tensors["input_zero_point"] = zero_point
        arguments = {
            "num_bits": 8,
            "type": "float" if is_float8 else "int",
            "symmetric": symmetric,
            "strategy": "tensor",
            "dynamic": False,
        }
        found[owner] = (tensors, arguments)
    return found


def without_ties(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Shared tensors once, under their first names, as safetensors wants it."""
    seen: set[tuple[Any, ...]] = set()
    result = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        result[name] = tensor.detach().contiguous()
    return result


def _configuration(groups: list[dict[str, Any]]) -> dict[str, Any]:
    formats = {group["format"] for group in groups}
    return {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else ("mixed-precision" if formats else "dense"),
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": [],
        "kv_cache_scheme": None,
    }


def save_checkpoint(model: nn.Module, folder: str | Path, *, ignore: Iterable[str] = ()) -> Path:
    """Write a transformers model as a folder that ``from_pretrained`` and serving stacks load.

    Quantized weights of Linear and Embedding layers are stored in the formats of the package
    compressed-tensors; all others dense, with their compressed values. The folder is there whole or not at
    all. The model stays as it is. Layers are compressed one after the other: beside the model, memory for one
    is needed.

    Args:
        model: a model of transformers, prepared by a :class:`.Quantizer` in eager mode; or a plain one.
        folder: where to write; it must be empty or not there.
        ignore: names of modules whose quantized weights are stored dense.

    Raises:
        TypeError: the model has no configuration of transformers.
        ValueError: compressed-tensors cannot hold a tensor's quantization.
        FileExistsError, NotADirectoryError: ``folder`` has files in it, or is a file.
        OSError: ``folder`` cannot be written.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained"):
        raise TypeError(
            f"model must be a model of transformers, with a config; got {type(model).__name__}. "
            f"coreai_opt.export.save(model, 'x.safetensors', ...) writes others"
        )
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder: {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"folder: {folder} has files in it")
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"folder: there is no folder {folder.parent}")
    content = Content(model, ignore)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        file = temporary / _WEIGHTS_FILE
        write_tensors(
            file, content.tensors(), {"format": "pt"}, content.header_size(with_configuration=False)
        )
        quantization = content.configuration()
        _warn_of_packed_zero_points(quantization)
        saved_config: Any = copy.deepcopy(config)
        if quantization["config_groups"]:
            saved_config.quantization_config = quantization
        saved_config.save_pretrained(temporary)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(temporary)
        os.chmod(temporary, 0o777 & ~_umask())
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _warn_of_packed_zero_points(quantization: dict[str, Any]) -> None:
    layers = [
        name
        for group in quantization["config_groups"].values()
        if group["format"] == PACKED and not group["weights"]["symmetric"]
        for name in group["targets"]
    ]
    if layers:
        warnings.warn(
            f"the {len(layers)} layers {layers[:3]} ... have packed zero points: transformers 5.23 does not "
            f"load them, the package compressed-tensors does. qscheme 'symmetric', or 8 bits, have none",
            UserWarning,
            stacklevel=3,
        )


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
