"""Names of the compilers, which the model's JSON has."""

__all__ = ["CUDA", "TRITON"]

CUDA, TRITON = "CUDA C++", "Triton"
