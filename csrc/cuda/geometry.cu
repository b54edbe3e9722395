// Layouts of blocks, for the library of CUDA kernels.
#include "cpu/geometry.cpp"
