"""Compressed weights in files, mapped into memory: for models that are larger than it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from safetensors.torch import load_file, save_file
from torch import nn

__all__ = ["Folder", "check", "folder"]


def check(model: nn.Module, mmap_dir: str | Path) -> None:
    """Raise unless the weights of the model can be put into files in a folder.

    Raises:
        ValueError: a tensor of the model is not on the CPU.
        NotADirectoryError: ``mmap_dir`` is a file.
        FileExistsError: ``mmap_dir`` is not empty.
    """
    path = Path(mmap_dir)
    for name, tensor in model.state_dict().items():
        if hasattr(tensor, "device") and tensor.device.type != "cpu":
            raise ValueError(
                f"mmap_dir: files are mapped into the memory of the CPU; {name!r} is on {tensor.device}"
            )
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"mmap_dir must name a folder; {path} is a file")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"mmap_dir must name an empty folder or none; {path} has files in it")


class Folder:
    """Where compressed weights are kept: in memory for None."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def moved(self, constant: nn.Module, name: str) -> nn.Module:
        """The module, its buffers in a file ``<name>.safetensors``.

        What is more than letters, digits and ``_.-~`` in the name is written ``%2F``: modules may be called
        ``a/b``, or by an absolute path, and the file stays in the folder.
        """
        if self._path is None:
            return constant
        file = self._path / f"{quote(name, safe='')}.safetensors"
        buffers = {key: value.contiguous() for key, value in constant.named_buffers()}
        save_file(buffers, file)
        for key, value in load_file(file).items():
            setattr(constant, key, value)
        return constant


@contextmanager
def folder(mmap_dir: str | Path | None) -> Iterator[Folder]:
    """The folder, made if it is not there. If the block raises, what it has written is deleted."""
    if mmap_dir is None:
        yield Folder(None)
        return
    path = Path(mmap_dir)
    existed = path.is_dir()
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield Folder(path)
    except BaseException:
        for file in path.glob("*.safetensors"):
            file.unlink()
        if not existed:
            shutil.rmtree(path, ignore_errors=True)
        raise
