"""What writers of all kinds of files get and give, and files that are there whole or not at all."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Job", "SavedModel", "flat_outputs", "relative_difference", "require_space", "size_of", "written"]


@dataclass
class Job:
    """A finalized model that is to be written.

    Attributes:
        model: the model, in evaluation mode.
        args: the positional arguments of an example forward.
        input_names: names of the tensors among the arguments, in their order.
        output_names: names of the tensors that the forward returns.
        dynamic_shapes: for :func:`torch.export.export`.
        half: store float32 as float16.
        options: of one kind of file.
    """

    model: nn.Module
    args: tuple[Any, ...]
    input_names: list[str]
    output_names: list[str]
    dynamic_shapes: Any
    half: bool
    options: dict[str, Any]

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [each for each in pytree.tree_leaves(self.args) if isinstance(each, Tensor)]

    def require_tensors(self) -> None:
        """ValueError unless all arguments are tensors."""
        for each in self.args:
            if not isinstance(each, Tensor):
                raise ValueError(
                    f"example_inputs: inputs of this kind of file are tensors; got {type(each).__name__}. "
                    f"Wrap the model in a module whose forward takes tensors alone"
                )


@dataclass(frozen=True)
class SavedModel:
    """What :func:`coreai_opt.export.save` has written.

    Attributes:
        path: where it is.
        size: bytes.
        difference: of its outputs from those of the compressed model, relative to these, both as the root of
            the sum of squares; None if it was not run.
        checked: how it was checked, or why it was not.
    """

    path: Path
    size: int
    difference: float | None
    checked: str


def relative_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Root of the sum of squared differences, divided by that of the expected values.

    Raises:
        ValueError: there are other numbers of tensors, or other shapes.
    """
    shapes = [[tuple(each.shape) for each in tensors] for tensors in (found, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the written model returns shapes {shapes[0]}, the compressed model {shapes[1]}")
    pairs = list(zip(found, expected, strict=True))
    error = sum(float((a.cpu().double() - b.cpu().double()).square().sum()) for a, b in pairs)
    size = sum(float(b.cpu().double().square().sum()) for _, b in pairs)
    return (error / size) ** 0.5 if size else error**0.5


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    return path.stat().st_size


def require_space(folder: Path, model: nn.Module) -> None:
    """OSError unless a folder has room for the tensors of a model: some writers end the process without."""
    needed = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"path: there is too little space, {free / 2**20:.1f} MiB; the model may take "
            f"{needed / 2**20:.1f} MiB",
            str(folder),
        )


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A path of the same name in a folder beside ``path``, which takes its place at the end of the block.

    So do files that the block has written beside it, whose names must begin with that of ``path``. If the
    block raises, nothing is left of it, and what was there before stays. The folder, with dots in front of
    its name, is in the same folder as ``path``, so that renaming is one step.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new, old = folder / "written", folder / "replaced"
        new.mkdir()
        old.mkdir()
        yield new / path.name
        _put_in_place(new, old, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(new: Path, old: Path, path: Path) -> None:
    """Move what is in the folder ``new`` to where ``path`` is, and what was there to the folder ``old``."""
    beside = sorted(each.name for each in new.iterdir() if each.name != path.name)
    targets = [path.parent / name for name in (*beside, path.name)]
    try:
        for target in targets:
            made = new / target.name
            is_one_step = target == path and not target.is_dir() and not made.is_dir()
            if target.exists() and not is_one_step:
                os.replace(target, old / target.name)
            os.replace(made, target)
    except BaseException:
        for target in targets:
            if target.exists() and not (new / target.name).exists():
                os.replace(target, new / target.name)
            if (old / target.name).exists():
                os.replace(old / target.name, target)
        raise


def flat_outputs(result: Any) -> list[Tensor]:
    """The tensors in what a forward returns."""
    return [each for each in pytree.tree_leaves(result) if isinstance(each, torch.Tensor)]
