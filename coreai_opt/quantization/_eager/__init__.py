"""Quantization of modules as they run: simulators at the operations that a forward calls."""
