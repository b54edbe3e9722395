"""Where ours differs from Apple's package on purpose. docs/differences.md says why, under the same titles."""

from fnmatch import fnmatchcase

__all__ = ["INTENDED", "is_intended"]

# Pattern of names of cases and calls -> title in docs/differences.md.
INTENDED: dict[str, str] = {
    "float64-*": "float64 inputs are computed in float32",
    "input complex": "Inputs that are not floating point are refused",
    "input bool": "Inputs that are not floating point are refused",
    "input integers": "Inputs that are not floating point are refused",
    "fp4_forward refuses *": "fp4_forward takes every floating-point dtype",
    "extension *": "More number formats",
    "state of a stepped simulator into a fresh one": "A checkpoint loads into a fresh simulator",
}


def is_intended(name: str) -> bool:
    """Whether the case or call ``name`` is expected to differ."""
    return any(fnmatchcase(name, pattern) for pattern in INTENDED)
