// The CUDA operators of whole steps on the CPU.
#include "cuda/observe_and_fake_quantize.cu"
#include "cpu/geometry.cpp"
#include "cpu/huge_pages.cpp"
#include "cuda/fake_quantize.cu"

extern "C" void take_turns_backwards(bool backwards) { emulation::backwards = backwards; }
