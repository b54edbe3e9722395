"""The bytes of the constants in a Core AI program, read from its text, not as the package reads them."""

import re
from typing import Any

__all__ = ["resources"]

_RESOURCE = re.compile(r'(\w+): "0x([0-9A-Fa-f]*)"')


def resources(module: Any) -> dict[str, bytes]:
    """By name; the text begins with four bytes that give the alignment."""
    return {name: bytes.fromhex(digits)[4:] for name, digits in _RESOURCE.findall(str(module))}
