"""Tensors whose parts lie on several ranks (DTensors): what a rank holds, and what ranks tell each other."""
