"""Palettization: weights that take their values from small palettes."""
