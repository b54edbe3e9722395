"""Shapes of tensors."""

__all__ = ["normalize_axis"]


def normalize_axis(axis: int, rank: int) -> int:
    """``axis`` counted from the front; ValueError if the tensor has no such axis."""
    if not -rank <= axis < rank:
        raise ValueError(f"axis must be in [{-rank}, {rank}) for a tensor of {rank} dimensions; got {axis}")
    return axis % rank
