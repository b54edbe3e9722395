"""Single calls whose value, or exception, must be the same."""

from .invalid_calls import INVALID
from .valid_calls import VALUES

__all__ = ["CALLS"]

CALLS = VALUES | INVALID
