"""GPU kernels on the CPU: CUDA C++ through a header, compiled PTX through an interpreter."""
