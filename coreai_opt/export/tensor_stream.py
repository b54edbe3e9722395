"""Safetensors files that are written tensor by tensor: what is written need not be in memory at once.

The package safetensors writes a file from all of its tensors. The format is a length, a header in JSON that
may end in spaces, and the tensors' bytes one after the other: https://huggingface.co/docs/safetensors.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["write_tensors"]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
_ALIGNMENT = 8


def write_tensors(
    path: Path, tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str], header_size: int
) -> None:
    """Write tensors as they come. Those whose bytes would leave the next one unaligned come last.

    Args:
        path: the file, which is replaced.
        tensors: by name.
        metadata: for the header. It is read after the last tensor: what follows from them may be added.
        header_size: bytes to leave for the header in front of the tensors.

    Raises:
        ValueError: a dtype is not in the format, or the header does not fit.
        OSError: the file cannot be written.
    """
    entries: dict[str, object] = {}
    late: list[tuple[str, Tensor]] = []
    header_size = -(-header_size // _ALIGNMENT) * _ALIGNMENT
    with path.open("wb") as file:
        file.seek(8 + header_size)
        end = 0

        def write(name: str, tensor: Tensor) -> None:
            nonlocal end
            if tensor.dtype not in _DTYPES:
                raise ValueError(
                    f"{name!r} has the dtype {tensor.dtype}, which safetensors files do not have"
                )
            data = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(data.view(torch.uint8).numpy().data)
            begin, end = end, end + data.nbytes
            shape = list(tensor.shape)
            entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}

        for name, tensor in tensors:
            if tensor.nbytes % _ALIGNMENT:
                late.append((name, tensor))
            else:
                write(name, tensor)
        for name, tensor in sorted(late, key=lambda each: -each[1].element_size()):
            write(name, tensor)
        header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
        if len(header) > header_size:
            raise ValueError(f"header_size: the header has {len(header)} bytes; got {header_size}")
        file.seek(0)
        file.write(header_size.to_bytes(8, "little") + header.ljust(header_size))
