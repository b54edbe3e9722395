"""What the model of GPUs expects of the GPU check's cases (``python -m benchmarks.gpu_model --json``)."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_cases import Case

__all__ = ["Predictions"]

_OPERATIONS = {"forward": "forward", "step": "observe and quantize", "backward": "backward"}
_FORMATS = {"fp4": "MXFP4", "mxint8": "MXINT8", "nvfp4": "NVFP4"}
_BLOCKS = {"tensor": "tensor", "channel": "rows", "block32": "blocks of 32", "block16": "blocks of 16"}


class Predictions:
    """Shares of the copy bandwidth, by operation, case and dtype.

    Args:
        rows: of the model's JSON.
        gpu: a device's name as the driver has it, e.g. ``"NVIDIA H200"``.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], gpu: str) -> None:
        self._shares: dict[tuple[str, str, str], float] = {}
        for row in rows:
            for name, reached in row["devices"].items():
                if name in gpu:
                    self._shares[row["operation"], row["case"], row["dtype"]] = reached["share"]

    @classmethod
    def read(cls, path: Path, gpu: str) -> "Predictions":
        """Those of a file; none if it is not there."""
        return cls(json.loads(path.read_text()) if path.is_file() else [], gpu)

    def microseconds(self, case: Case, operation: str, dtype: str, copy: float) -> float | None:
        """The time that the model expects, where a copy of the tensor takes ``copy`` microseconds.

        None where the model has no such case, or not this GPU.
        """
        blocks = _BLOCKS[case.granularity]
        name = f"{_FORMATS.get(case.format_name, case.format_name)}, {blocks}"
        share = self._shares.get((_OPERATIONS[operation], "" if operation == "backward" else name, dtype))
        # The model's share is that of one read, one write and a bit an element.
        once = 1 + 1 / 8 / (2 * case.x.element_size())
        return None if share is None else copy * once / share
