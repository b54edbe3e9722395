// The CUDA operators that convert to quantized values and back on the CPU.
#include "cuda/quantize.cu"
#include "cpu/geometry.cpp"
#include "cpu/huge_pages.cpp"
