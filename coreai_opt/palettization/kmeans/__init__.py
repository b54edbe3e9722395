"""Palettes found by k-means."""

from coreai_opt.palettization.kmeans.palettizer import KMeansPalettizer

__all__ = ["KMeansPalettizer"]
