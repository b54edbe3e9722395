"""Whole models: what compression adds to a training step."""
