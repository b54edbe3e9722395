"""GPU kernels on the CPU: their compiled PTX, through an interpreter."""
