// The CUDA operators of whole steps on the CPU.
#include "cuda/observe_and_fake_quantize.cu"
#include "cpu/geometry.cpp"
#include "cpu/huge_pages.cpp"
#include "cuda/fake_quantize.cu"
#if defined(COREAI_EMULATED_DEVICES)
#include "cuda/captured.cu"
#include "cuda/observe_range.cu"
#endif

#if !defined(COREAI_RECORDED)
extern "C" {
void take_turns_backwards(bool backwards) { emulation::backwards = backwards; }
// Of grids that are started as a whole: blocks that the device says it holds, and those that it takes.
void hold_blocks(int promised, int taken) { emulation::promised_blocks = promised, emulation::taken_blocks = taken; }
int64_t launches() { return emulation::launches; }
int64_t whole_grids() { return emulation::whole_grids; }
}
#else
// Whom launches and memory are told.
extern "C" void tell(void (*argument)(const void*, int64_t), void (*launch)(const char*, int64_t, bool),
                     void (*memory)(const void*, int64_t)) {
  emulation::tell_argument = argument, emulation::tell_launch = launch, emulation::tell_memory = memory;
}
#endif
