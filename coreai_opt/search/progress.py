"""Measurements on disk, so that a search goes on where it was ended."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from coreai_opt._utils.writing import write_text
from coreai_opt.search.candidates import Candidate
from coreai_opt.search.measuring import Measurement, Metric

__all__ = ["Ledger", "fingerprint"]

_SECONDS_BETWEEN = 5.0


def fingerprint(
    model: nn.Module, samples: Sequence[Any], candidates: Sequence[Candidate], metric: Metric
) -> str:
    """A short text that differs where measurements would."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        _add(digest, tensor)
    for leaf in tree_leaves(list(samples)):
        if isinstance(leaf, Tensor):
            _add(digest, leaf)
        else:
            digest.update(repr(leaf).encode())
    for candidate in candidates:
        digest.update(f"{candidate.name} {candidate.spec!r}".encode())
    name = metric if isinstance(metric, str) else getattr(metric, "__qualname__", type(metric).__qualname__)
    digest.update(name.encode())
    return digest.hexdigest()[:32]


def _add(digest: Any, tensor: Any) -> None:
    if isinstance(tensor, Tensor):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().tobytes() if values.numel() else b"")


class Ledger:
    """The measurements of one search.

    Args:
        path: the file; None to keep nothing.
        identity: see :func:`fingerprint`.

    Raises:
        ValueError: the file belongs to another search, or is none.
    """

    def __init__(self, path: str | Path | None, identity: str) -> None:
        self.path = None if path is None else Path(path)
        self.identity = identity
        self.found: dict[tuple[str, str], Measurement] = {}
        # Of each candidate, the layers that it fits, once they are known.
        self.layers: dict[str, dict[str, int]] = {}
        self._saved = time.monotonic()
        if self.path is not None and self.path.exists():
            self._load(self.path)

    def _load(self, path: Path) -> None:
        try:
            data = json.loads(path.read_text())
            identity = data["search"]
            layers = {name: dict(found) for name, found in data["layers"].items()}
            rows = [
                (str(layer), str(name), float(damage), int(bits))
                for layer, name, damage, bits in data["measurements"]
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"state_path {path} holds no state of a search: {error!r}") from error
        if identity != self.identity:
            raise ValueError(
                f"state_path {path} belongs to a search with another model, samples, candidates or metric: "
                f"remove it, or name another file"
            )
        self.layers = layers
        self.found = {(row[0], row[1]): Measurement(*row) for row in rows}

    def add(self, measurement: Measurement) -> None:
        """Keep a measurement; the file is written every few seconds."""
        self.found[measurement.layer, measurement.candidate] = measurement
        if time.monotonic() - self._saved > _SECONDS_BETWEEN:
            self.save()

    def has_all(self, candidate: str) -> bool:
        """Whether a candidate was tried in each layer that it fits."""
        return candidate in self.layers and all(
            (layer, candidate) in self.found for layer in self.layers[candidate]
        )

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self.path is None:
            return
        rows = [[each.layer, each.candidate, each.damage, each.bits] for each in self.found.values()]
        data = {"search": self.identity, "layers": self.layers, "measurements": rows}
        write_text(self.path, json.dumps(data))
        self._saved = time.monotonic()
