"""What an algorithm has changed, on disk, so that it goes on where it was ended."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from coreai_opt._call_inputs import Arguments
from coreai_opt._utils.writing import replaced, write_text

__all__ = ["Progress"]


class Progress:
    """Changed tensors by the unit of work that changed them: a file each, in one folder.

    Args:
        path: the folder, which is made if it does not exist; None to keep nothing.
        model: prepared, as it is before the first change.
        algorithm: a text that tells the algorithms and their settings.
        batches: the data.

    Raises:
        ValueError: the folder belongs to another model, algorithm or data.
    """

    def __init__(
        self, path: str | Path | None, model: nn.Module, algorithm: str, batches: Sequence[Arguments]
    ) -> None:
        self.path = None if path is None else Path(path)
        if self.path is None:
            return
        identity = _fingerprint(model, algorithm, batches)
        marker = self.path / "algorithm.json"
        if marker.exists():
            if json.loads(marker.read_text()).get("identity") != identity:
                raise ValueError(
                    f"state_path {self.path} belongs to a run with another model, algorithm or data: remove "
                    f"it, or name another folder"
                )
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(marker, json.dumps({"identity": identity, "algorithm": algorithm}))

    def _file(self, unit: str) -> Path | None:
        name = hashlib.sha256(unit.encode()).hexdigest()[:24]
        return None if self.path is None else self.path / f"{name}.safetensors"

    def restore(self, unit: str, tensors: Mapping[str, Tensor]) -> bool:
        """Give the tensors the values that the unit left; False if it has not been done."""
        file = self._file(unit)
        if file is None or not file.exists():
            return False
        found = load_file(str(file))
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(found[name])
        return True

    def save(self, unit: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep what the unit left."""
        file = self._file(unit)
        if file is not None:
            kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            with replaced(file) as part:
                save_file(kept, str(part))


def _fingerprint(model: nn.Module, algorithm: str, batches: Sequence[Arguments]) -> str:
    digest = hashlib.sha256(algorithm.encode())
    tensors: list[tuple[str, Any]] = list(model.state_dict().items())
    for batch in batches:
        tensors += [("", leaf) for leaf in tree_leaves((batch.args, batch.kwargs))]
    for name, value in tensors:
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
