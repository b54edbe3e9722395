"""Errors of the quantization components."""

__all__: list[str] = []


class _BlockSizeMismatchError(ValueError):
    """A block size does not divide the tensor."""
