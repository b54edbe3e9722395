"""Files that are there whole or not at all, whenever the process is ended."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replaced", "write_text"]


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A path beside ``path``, ``<name>.part``; its file takes the place of ``path`` at the end of the block.

    If the block raises, the file is deleted, and what was at ``path`` stays.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8.

    Raises:
        OSError: the folder cannot be written to.
    """
    with replaced(path) as part:
        part.write_text(text, encoding="utf-8")
