"""Micro-benchmarks: one file an operation, one harness. ``python -m benchmarks --help``."""
