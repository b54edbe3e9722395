// The CUDA operators of fake quantization on the CPU.
#include "cuda/fake_quantize.cu"
#include "cpu/geometry.cpp"
#include "cpu/huge_pages.cpp"

extern "C" void take_turns_backwards(bool backwards) { emulation::backwards = backwards; }
