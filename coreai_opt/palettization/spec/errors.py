"""Why a weight cannot be palettized as its specification asks."""

__all__ = ["_IncompatibleClusterDimError", "_IncompatibleGranularityError"]


class _IncompatibleGranularityError(Exception):
    """The groups do not divide the weight."""


class _IncompatibleClusterDimError(Exception):
    """The vectors of a palette do not divide the weight, or a group of it."""
