// The CUDA operators that observe ranges and choose parameters on the CPU.
#include "cuda/observe_range.cu"
#include "cpu/geometry.cpp"
#include "cpu/huge_pages.cpp"

extern "C" void take_turns_backwards(bool backwards) { emulation::backwards = backwards; }
