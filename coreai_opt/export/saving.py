"""From a compressed model to a file that is checked."""

import copy
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from coreai_opt.common import ExportBackend
from coreai_opt.export import coreai_file, coreml_file, onnx, safetensors_file, torch_file
from coreai_opt.export.files import Job, SavedModel, flat_outputs, relative_difference, size_of, written
from coreai_opt.export.lowering import finalized_for, is_finalized_for_core_ai, lowered_to_onnx

__all__ = ["SavedModel", "outputs_of", "save", "save_lowered"]

_TOLERANCE = 0.05


@dataclass(frozen=True)
class _Kind:
    """How one kind of file is written.

    Attributes:
        lower: from a copy of the model to one that holds what the file does.
        check: raises for what cannot be written.
        write: writes it.
        run: what the written file computes for the example; None if it cannot be run here.
    """

    lower: Callable[[nn.Module], nn.Module]
    check: Callable[[Job], None]
    write: Callable[[Job, Path], None]
    run: Callable[[Job, Path], list[Tensor] | None]


_KINDS = {
    ".aimodel": _Kind(
        partial(finalized_for, backend=ExportBackend.CoreAI),
        coreai_file.check,
        coreai_file.write,
        coreai_file.run,
    ),
    ".mlpackage": _Kind(
        partial(finalized_for, backend=ExportBackend.CoreML),
        coreml_file.check,
        coreml_file.write,
        coreml_file.run,
    ),
    ".onnx": _Kind(lowered_to_onnx, onnx.check, onnx.write, onnx.run),
    ".pt2": _Kind(
        partial(finalized_for, backend=ExportBackend.Torch),
        torch_file.check,
        torch_file.write,
        torch_file.run,
    ),
    ".safetensors": _Kind(
        lambda model: model, safetensors_file.check, safetensors_file.write, safetensors_file.run
    ),
}


def save(
    model: nn.Module,
    path: str | Path,
    example_inputs: tuple[Any, ...],
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
    half: bool = False,
    tolerance: float = _TOLERANCE,
    progress: bool = True,
    **options: Any,
) -> SavedModel:
    """Write a compressed model to a file, and check it by running it.

    The suffix says what is written: ``.aimodel`` for Core AI, ``.mlpackage`` for Core ML, ``.onnx``, ``.pt2``
    for :func:`torch.export.load`, or ``.safetensors`` for :func:`load_checkpoint`. The file is there whole or
    not at all: if anything fails, what was at ``path`` before stays.

    Args:
        model: prepared by compressors, or finalized, or neither; it is copied, and stays as it is.
        path: where to write; what is there is replaced.
        example_inputs: positional arguments for one forward.
        input_names: names of the tensors among them; by default those of the forward's arguments.
        output_names: names of the tensors that the forward returns; by default ``output``, ``output_1``, ...
        dynamic_shapes: for :func:`torch.export.export`; not for ``.mlpackage``.
        half: store float32 as float16, and compute in it: ``.aimodel``, ``.mlpackage``.
        tolerance: the largest relative difference of outputs from those of the compressed model, in the root
            of the sum of squares. Quantized activations that are rounded the other way make up most of it.
        progress: show a bar.
        **options: ``minimum_deployment_target`` (``"iOS18"``) and ``compute_units`` for ``.mlpackage``,
            ``opset`` for ``.onnx``, ``ignore`` (names of modules to store dense) for ``.safetensors``.

    Raises:
        TypeError: ``model`` is no module, or ``example_inputs`` no tuple.
        ValueError: the suffix or an option is unknown; the model does not run with the inputs; the file
            cannot hold how a tensor is compressed; or the written model computes something else.
        OSError: ``path`` cannot be written to.
        ImportError: a package is missing; the message says how to install it.
        NotImplementedError: the kind of file lacks a dtype, or parameters that depend on the input.
    """
    kind, path = _checked(model, path, example_inputs)
    original = copy.deepcopy(model).eval().cpu()
    example_inputs = pytree.tree_map_only(Tensor, Tensor.cpu, example_inputs)
    expected = outputs_of(original, example_inputs)
    names = _input_names(model, example_inputs, input_names), _output_names(expected, output_names)

    def job() -> Job:
        return Job(kind.lower(original).eval(), example_inputs, *names, dynamic_shapes, half, options)

    return _write(kind, job, path, expected, tolerance, progress)


def save_lowered(
    model: nn.Module,
    path: str | Path,
    example_inputs: tuple[Any, ...],
    expected: list[Tensor],
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> SavedModel:
    """Write a model that is expressed in what its kind of file holds, and check it as :func:`save` does.

    Args:
        model: in evaluation mode; it is not copied.
        path: as for :func:`save`.
        example_inputs: likewise.
        expected: the outputs that it is to compute.
        input_names: as for :func:`save`.
        output_names: likewise.

    Raises:
        As :func:`save`.
    """
    kind, path = _checked(model, path, example_inputs)
    names = _input_names(model, example_inputs, input_names), _output_names(expected, output_names)
    job = Job(model, example_inputs, *names, dynamic_shapes=None, half=False, options={})
    return _write(kind, lambda: job, path, expected, tolerance=_TOLERANCE, progress=False)


def _write(
    kind: _Kind,
    make_job: Callable[[], Job],
    path: Path,
    expected: list[Tensor],
    tolerance: float,
    progress: bool,
) -> SavedModel:
    steps = tqdm(total=4, desc=f"{path.name}: finalizing", disable=not progress, leave=False)
    with steps, warnings.catch_warnings():
        # Of torch, about what the converters call in it.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        job = make_job()
        _advance(steps, f"{path.name}: checking")
        kind.check(job)
        with written(path) as temporary:
            _advance(steps, f"{path.name}: converting")
            with torch.no_grad():
                kind.write(job, temporary)
            _advance(steps, f"{path.name}: running")
            found = kind.run(job, temporary)
            difference = None if found is None else relative_difference(found, expected)
            if difference is not None and not difference <= tolerance:
                raise ValueError(
                    f"the written model computes something else: its outputs differ by {difference:.3g} from "
                    f"those of the compressed model, relative to these; tolerance={tolerance}"
                )
            size = size_of(temporary.parent)
    checked = "it was run" if difference is not None else "it was not run: Core ML models run on macOS only"
    return SavedModel(path, size, difference, checked)


def _checked(model: Any, path: str | Path, example_inputs: Any) -> tuple[_Kind, Path]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    if not isinstance(example_inputs, tuple):
        raise TypeError(
            f"example_inputs must be a tuple of the forward's positional arguments; got "
            f"{type(example_inputs).__name__}"
        )
    path = Path(path)
    if path.suffix not in _KINDS:
        raise ValueError(
            f"path must end in {', '.join(_KINDS)}, which says what is written; got {path.name!r}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"path: the folder {path.parent} cannot be written to")
    if is_finalized_for_core_ai(model) and path.suffix not in (".aimodel", ".pt2"):
        raise ValueError(
            f"the model is finalized for Core AI, whose operators {path.suffix} has not: give the prepared "
            f"model, or one finalized for it"
        )
    return _KINDS[path.suffix], path


@torch.no_grad()
def outputs_of(model: nn.Module, example_inputs: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that a model returns; ValueError if it does not run."""
    try:
        return [each.clone() for each in flat_outputs(model(*example_inputs))]
    except (TypeError, RuntimeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"example_inputs: the model does not run with them: {error}") from error


def _input_names(model: nn.Module, args: tuple[Any, ...], names: Sequence[str] | None) -> list[str]:
    count = sum(isinstance(each, Tensor) for each in pytree.tree_leaves(args))
    if names is not None:
        return _checked_names("input_names", names, count)
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [
        each.name
        for each in parameters
        if each.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ]
    if count == len(args) <= len(positional):
        return positional[:count]
    return [f"input_{i}" for i in range(count)]


def _output_names(outputs: list[Tensor], names: Sequence[str] | None) -> list[str]:
    if names is not None:
        return _checked_names("output_names", names, len(outputs))
    return [f"output_{i}" if i else "output" for i in range(len(outputs))]


def _checked_names(what: str, names: Sequence[str], count: int) -> list[str]:
    if isinstance(names, str) or len(names) != count or len(set(names)) != count:
        raise ValueError(f"{what} must hold {count} different names, one for each tensor; got {names!r}")
    return list(names)


def _advance(bar: Any, description: str) -> None:
    bar.update()
    bar.set_description(description)
