"""What the model of GPUs expects of the GPU check's cases (``python -m benchmarks.gpu_model --json``)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cases
from benchmarks.gpu_cases import DTYPES, Case
from benchmarks.gpu_model.names import CUDA, TRITON

__all__ = ["Predictions", "compilers_in_use"]

_OPERATIONS = {"forward": "forward", "step": "observe and quantize", "backward": "backward"}
_FORMATS = {"fp4": "MXFP4", "mxint8": "MXINT8", "nvfp4": "NVFP4"}
_BLOCKS = {"tensor": "tensor", "channel": "rows", "block32": "blocks of 32", "block16": "blocks of 16"}


def compilers_in_use() -> Sequence[str]:
    """Whose kernels run on a GPU here; where the first has none, those of the second."""
    from coreai_kernels import backends, native

    return (TRITON,) if native.cuda_missing or backends.forced() == "triton" else (CUDA, TRITON)


class Predictions:
    """Shares of the copy bandwidth, by operation, case and dtype.

    Args:
        rows: of the model's JSON.
        gpu: a device's name as the driver has it, e.g. ``"NVIDIA H200"``.
        compilers: of which the first counts that has an operation.
    """

    def __init__(
        self, rows: Iterable[Mapping[str, Any]], gpu: str, compilers: Sequence[str] = (CUDA, TRITON)
    ) -> None:
        # Bytes an element, and the share of the copy bandwidth at which they move.
        self._found: dict[tuple[str, str, str], tuple[float, float]] = {}
        chosen = [row for row in rows if row["compiler"] in compilers]
        for row in sorted(chosen, key=lambda row: compilers.index(row["compiler"])):
            for name, reached in row["devices"].items():
                if name in gpu:
                    key = row["operation"], row["case"], row["dtype"]
                    self._found.setdefault(key, (row["bytes"], reached["share"]))

    @classmethod
    def read(cls, path: Path, gpu: str, compilers: Sequence[str] = (CUDA, TRITON)) -> "Predictions":
        """Those of a file; none if it is not there."""
        return cls(json.loads(path.read_text())["rows"] if path.is_file() else [], gpu, compilers)

    def microseconds(self, case: Case, operation: str, dtype: str, copy: float) -> float | None:
        """The time that the model expects, where a copy of the tensor takes ``copy`` microseconds.

        None where the model has no such case, or not this GPU.
        """
        name = f"{_FORMATS.get(case.format_name, case.format_name)}, {_BLOCKS[case.granularity]}"
        return self._scaled(_OPERATIONS[operation], "" if operation == "backward" else name, dtype, copy)

    def of_operator(self, case: cases.Case, copy: float) -> float | None:
        """The same for masks."""
        if case.op == "topk_mask":
            return self._scaled("mask", "largest magnitudes", case.dtype, copy)
        return self._scaled("mask", case.format, case.dtype, copy) if case.op == "nm_mask" else None

    def _scaled(self, operation: str, case: str, dtype: str, copy: float) -> float | None:
        if (operation, case, dtype) not in self._found:
            return None
        moved, share = self._found[operation, case, dtype]
        return copy * moved / (2 * DTYPES[dtype].itemsize) / share
