"""Plain data from text that others may have written: of bounded depth and size, or an error that says why."""

import json
from typing import IO, Any

import yaml

__all__ = ["json_data", "yaml_data"]

# More than any configuration has, and little enough to be checked at once.
_DEEPEST, _LARGEST = 100, 1_000_000


def yaml_data(text: str | bytes | IO[Any]) -> Any:
    """What YAML text holds, in the types that it has of itself: a file cannot name a class to be made.

    Raises:
        yaml.YAMLError: it is no YAML.
        ValueError: a value is not of the type that its tag names; it is nested more than 100 levels deep; it
            contains itself; or, with every alias written out, it has more than a million values.
    """
    try:
        data = yaml.safe_load(text)
    except RecursionError:
        raise ValueError(f"the YAML text is nested more than {_DEEPEST} levels deep") from None
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:
        # What its constructors raise on, for example, `!!bool maybe`.
        raise ValueError(f"the YAML text has a value that does not fit its tag: {error!r}") from error
    _check_size(data, "YAML")
    return data


def json_data(text: str | bytes) -> Any:
    """What JSON text holds.

    Raises:
        ValueError: it is no JSON, is nested more than 100 levels deep, or has more than a million values.
    """
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError(f"the JSON text is nested more than {_DEEPEST} levels deep") from None
    _check_size(data, "JSON")
    return data


def _check_size(data: Any, what: str) -> None:
    sizes: dict[int, int | None] = {}  # of containers; None while their members are counted

    def size(value: Any, depth: int) -> int:
        if not isinstance(value, dict | list | tuple | set):
            return 1
        if depth == _DEEPEST:
            raise ValueError(f"the {what} text is nested more than {_DEEPEST} levels deep")
        if id(value) not in sizes:
            sizes[id(value)] = None
            members = value.values() if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum([size(member, depth + 1) for member in members])
        known = sizes[id(value)]
        if known is None:
            raise ValueError(f"the {what} text has a value that contains itself")
        return known

    if size(data, 0) > _LARGEST:
        raise ValueError(f"the {what} text has more than {_LARGEST} values, with aliases written out")
