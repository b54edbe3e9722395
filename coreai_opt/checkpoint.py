"""Prepared models in one file each: weights, simulators, steps, and how they were prepared."""

import io
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import GraphModule

from coreai_opt import _prepared_models
from coreai_opt._dynamic_shapes import dynamic_shapes_from, outline_of_shapes
from coreai_opt._environment import check_state_version, state_versions
from coreai_opt._input_outlines import arguments_from
from coreai_opt._restoring import undone_on_failure
from coreai_opt._summary import parameters_of
from coreai_opt._utils.config_utils import original_type, qualified_name
from coreai_opt._utils.reading import json_data
from coreai_opt.base_model_compressor import _BaseModelCompressor
from coreai_opt.common import CompressionType
from coreai_opt.export.checkpoints import without_ties
from coreai_opt.export.files import written
from coreai_opt.palettization import KMeansPalettizer
from coreai_opt.pruning import MagnitudePruner
from coreai_opt.quantization import Quantizer

__all__ = [
    "Restored",
    "description_of",
    "description_of_finalized",
    "load_checkpoint",
    "restore",
    "restore_finalized",
    "save_checkpoint",
]

_HEADER_KEY = "coreai_opt"
_COMPRESSORS: dict[CompressionType, type[_BaseModelCompressor]] = {
    CompressionType.PRUNING: MagnitudePruner,
    CompressionType.PALETTIZATION: KMeansPalettizer,
    CompressionType.QUANTIZATION: Quantizer,
}


class _Entry(BaseModel):
    """How one compressor has prepared the model."""

    kind: CompressionType
    config: str
    inputs: dict[str, Any]
    options: dict[str, Any]


class _Description(BaseModel):
    """What a file has to say about a prepared model."""

    versions: Any = None
    model: str
    compressors: list[_Entry] = Field(min_length=1)
    parameters: dict[str, list[int]] = {}
    metadata: dict[str, dict[str, Any]] = {}


def checked_description(description: Any) -> dict[str, Any]:
    """``description``, with what it may leave out.

    Raises:
        ValueError: it is not as :func:`description_of` gives it.
    """
    _Description.model_validate(description)
    return {"versions": {}, "parameters": {}, "metadata": {}} | description


class Restored(NamedTuple):
    """A model from a checkpoint, prepared as it was saved.

    Attributes:
        model: in graph mode, the graph module.
        compressors: those that have prepared it, in their order, at the steps that they had done.
    """

    model: nn.Module
    compressors: tuple[_BaseModelCompressor, ...]


def save_checkpoint(model: nn.Module, path: str | Path) -> Path:
    """Write a prepared model as one safetensors file, from which :func:`load_checkpoint` rebuilds it.

    The file has the model's ``state_dict``, each shared tensor once, and in its header JSON with the
    configurations, steps and versions. It is there whole or not at all; one that is there is replaced.

    Args:
        model: prepared by any of the compressors, in eager or in graph mode. It stays as it is.
        path: the file; its folder must be there.

    Returns:
        The path.

    Raises:
        RuntimeError: no compressor has prepared the model.
        ValueError: a configuration has a class that is not registered, or the state something other than
            tensors.
        FileNotFoundError: there is no such folder. Other OSErrors: it cannot be written.
    """
    path = Path(path)
    description = description_of(model)
    state = model.state_dict()
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"model: its state_dict has more than tensors, which safetensors cannot hold: {', '.join(others)}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: there is no folder {path.parent}")
    with written(path) as temporary:
        save_file(without_ties(state), temporary, {"format": "pt", _HEADER_KEY: json.dumps(description)})
    return path


def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Restored:
    """Rebuild a prepared model from a fresh float one and the file of :func:`save_checkpoint`.

    Args:
        model: of the structure that the saved one had before it was prepared; its weights do not matter. In
            eager mode it is changed in place.
        path: the file.
        example_inputs: what one forward takes, as for ``prepare``: it shows the operations. None for tensors
            of the shapes of the first ones: floating-point ones are 0, masks are as they were, and other
            integers are 1.
        dynamic_shapes: for graph mode; None for those of the first time.

    Returns:
        The prepared model and its compressors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, no such checkpoint, or of a later version; or the inputs are needed.
        RuntimeError: the model has other parameters than the saved one, or is prepared already. The model is
            as it was.
    """
    state, description = _read(Path(path))
    check_state_version(description["versions"], f"the checkpoint {path}")
    _check_model(model, description, path)
    result: Any = _StateDict(state)
    result._metadata = description["metadata"]
    try:
        return restore(model, description, result, example_inputs, dynamic_shapes)
    except Exception as error:
        error.add_note(f"while {path} was loaded: a prepared {description['model']}")
        raise


class _StateDict(dict[str, Tensor]):
    """A state_dict, which has metadata beside its tensors."""


def description_of(model: nn.Module) -> dict[str, Any]:
    """How a model was prepared, and the steps since then, in the types that JSON has.

    Raises:
        RuntimeError, ValueError: see :func:`save_checkpoint`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    preparations = _prepared_models.preparations_of(model)
    if not preparations:
        inner = [name for name, each in model.named_modules() if _prepared_models.is_prepared(each)]
        hint = f" Its part {inner[0]!r} is: save that." if inner else " Call prepare first."
        raise RuntimeError(f"save_checkpoint: the {type(model).__name__} is not prepared.{hint}")
    return _described(model, preparations)


def description_of_finalized(model: nn.Module) -> dict[str, Any] | None:
    """How a finalized model that goes on simulating activations was prepared; None of all others."""
    finalized = _prepared_models.finalized_of(model)
    return _described(model, finalized) if finalized else None


def _described(
    model: nn.Module, preparations: Mapping[CompressionType, _prepared_models.Preparation]
) -> dict[str, Any]:
    compressors = []
    for kind, each in preparations.items():
        options = dict(each.options)
        if "dynamic_shapes" in options:
            options["dynamic_shapes"] = outline_of_shapes(options["dynamic_shapes"])
        compressors.append(
            {
                "kind": str(kind),
                "config": each.config.to_yaml(),
                "inputs": each.inputs,
                "options": options,
            }
        )
    return {
        "versions": state_versions(),
        "model": "a graph" if isinstance(model, GraphModule) else qualified_name(original_type(model)),
        "compressors": compressors,
        "parameters": {name: list(tensor.shape) for name, tensor, _ in parameters_of(model)},
        # With the steps, and versions of modules' states.
        "metadata": getattr(model.state_dict(), "_metadata", {}),
    }


def restore(
    model: nn.Module,
    description: Mapping[str, Any],
    state_dict: Mapping[str, Tensor] | None,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    *,
    only_simulators: bool = False,
) -> Restored:
    """Prepare a float model as :func:`description_of` says.

    Args:
        model: the float model; as it was, if anything fails.
        description: of a prepared one.
        state_dict: its state; None for simulators that observe the inputs.
        example_inputs: as for :func:`load_checkpoint`.
        dynamic_shapes: as for :func:`load_checkpoint`.
        only_simulators: the model has its weights already; take what simulators hold from ``state_dict``.

    Raises:
        ValueError: the example inputs of the first time cannot be made again. Other errors as of ``prepare``.
    """
    _require_float(model)
    entries = checked_description(description)["compressors"]
    compressors = []
    with undone_on_failure(model):
        current = model
        for index, entry in enumerate(entries):
            kind = CompressionType(entry["kind"])
            compressor_class: Any = _COMPRESSORS[kind]
            options = dict(entry["options"])
            strict = {"strict_upstream": True} if options.pop("strict_upstream", False) else {}
            config = compressor_class._config_class.from_yaml(io.StringIO(entry["config"]))
            compressor = compressor_class(current, config, **strict)
            compressor._is_followed = only_simulators or index < len(entries) - 1
            inputs: Any = example_inputs
            if inputs is None:
                inputs = _inputs_again(entry["inputs"], model)
            if "dynamic_shapes" in options:
                if dynamic_shapes is not None:
                    options["dynamic_shapes"] = dynamic_shapes
                else:
                    options["dynamic_shapes"] = _from_outline(
                        dynamic_shapes_from, options["dynamic_shapes"], "dynamic_shapes"
                    )
            current = compressor.prepare(inputs, state_dict=state_dict, **options)
            compressor._is_followed = False
            compressors.append(compressor)
    return Restored(current, tuple(compressors))


def restore_finalized(
    model: nn.Module, description: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> nn.Module:
    """Let a float model simulate activations as :func:`description_of_finalized` says.

    Args:
        model: has the finalized weights; as it was, if anything fails.
        description: of a finalized model.
        state_dict: what the simulators of activations hold.

    Raises:
        As :func:`restore`.
    """
    with undone_on_failure(model):
        restored = restore(model, description, None)
        for compressor in restored.compressors:
            simulators: list[Any] = [
                each for each in restored.model.modules() if isinstance(each, compressor._simulator_class)
            ]
            for each in simulators:
                each.enable_fake_quant(False)  # the weights have their values
            compressor._finalize_for_torch(restored.model)
            _prepared_models.load_simulators(restored.model, state_dict, compressor._simulator_class)
            for each in simulators:
                each.enable_fake_quant(True)
    return restored.model


def _inputs_again(outline: Mapping[str, Any], model: nn.Module) -> Any:
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    return _from_outline(lambda each: arguments_from(each, device), outline, "example_inputs")


def _from_outline(make: Callable[[Any], Any], outline: Any, argument: str) -> Any:
    try:
        return make(outline)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"give {argument}: what was saved of them cannot be used: {error!r}") from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"path: there is no file {path}")
    with ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, "pt"))
        except SafetensorError as error:
            raise ValueError(
                f"path: {path} is damaged, or no safetensors file; it may be cut off: {error}"
            ) from None
        text = (file.metadata() or {}).get(_HEADER_KEY)
        if text is None:
            raise ValueError(
                f"path: {path} is a safetensors file, but not of save_checkpoint: its header has no "
                f"{_HEADER_KEY!r}"
            )
        try:
            description = checked_description(json_data(text))
        except ValueError as error:
            raise ValueError(f"path: the header of {path} is damaged: {error}") from error
        return {name: file.get_tensor(name) for name in file.keys()}, description  # noqa: SIM118


def _require_float(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if _prepared_models.is_prepared(model):
        raise RuntimeError("model: it is prepared already. Give a fresh float model")


def _check_model(model: Any, description: Mapping[str, Any], path: str | Path) -> None:
    _require_float(model)
    shapes = {name: list(each.shape) for name, each in model.named_parameters(remove_duplicate=False)}
    # Spectral norm's weight has a name here that it has not among the parameters.
    shapes |= {name: list(each.shape) for name, each, _ in parameters_of(model)}
    problems = []
    for name, shape in description["parameters"].items():
        if name not in shapes:
            problems.append(f"{name!r} is missing")
        elif shapes[name] != shape:
            problems.append(f"{name!r} has shape {tuple(shapes[name])}, in the file {tuple(shape)}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise RuntimeError(
            f"the checkpoint {path} is of another model, {description['model']}. In this "
            f"{type(model).__name__}, {'; '.join(problems[:5])}{more}"
        )
