"""What machine code says of a GPU kernel's speed, without a GPU: ``python -m benchmarks.gpu_model``."""
