"""``dynamic_shapes`` of :func:`torch.export.export` as plain data, and back."""

from collections.abc import Mapping
from typing import Any

from torch.export import Dim

__all__ = ["dynamic_shapes_from", "outline_of_shapes"]

_HINTS = {"AUTO": Dim.AUTO, "DYNAMIC": Dim.DYNAMIC, "STATIC": Dim.STATIC}


def outline_of_shapes(shapes: Any) -> dict[str, Any]:
    """The types that JSON has, for any ``dynamic_shapes``."""
    if shapes is None or isinstance(shapes, int):
        return {"value": shapes}
    if isinstance(shapes, Mapping):
        # Keys are numbers, for axes, or names.
        return {"dict": [[key, outline_of_shapes(each)] for key, each in shapes.items()]}
    if isinstance(shapes, tuple | list):
        return {"tuple": [outline_of_shapes(each) for each in shapes]}
    for name, hint in _HINTS.items():
        if shapes == hint:
            return {"hint": name}
    if type(shapes) is Dim:
        # A symbol stands for no limit.
        limits = [each if isinstance(each, int) else None for each in (shapes.min, shapes.max)]
        return {"dim": [shapes.__name__, *limits]}
    return {"unknown": str(shapes)}


def dynamic_shapes_from(outline: Mapping[str, Any]) -> Any:
    """What had this outline; dimensions of one name are one object again.

    Raises:
        ValueError: it had something that cannot be made from an outline, such as ``2 * dim``.
    """
    return _restored(outline, {})


def _restored(outline: Mapping[str, Any], dims: dict[str, Dim]) -> Any:
    [(form, content)] = outline.items()
    if form == "value":
        return content
    if form == "dict":
        return {key: _restored(each, dims) for key, each in content}
    if form == "tuple":
        return tuple(_restored(each, dims) for each in content)
    if form == "hint":
        return _HINTS[content]
    if form == "dim":
        name, low, high = content
        if name not in dims:
            dims[name] = Dim(name, min=low, max=high)
        return dims[name]
    raise ValueError(f"give dynamic_shapes: those of the first time had {content}")
