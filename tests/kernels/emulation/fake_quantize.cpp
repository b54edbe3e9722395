// The CUDA operators of fake quantization on the CPU.
#include "cuda/fake_quantize.cu"
#include "cpu/geometry.cpp"
#include "cpu/huge_pages.cpp"

extern "C" void take_turns_backwards(bool backwards) { emulation::backwards = backwards; }

extern "C" uint32_t quotient(uint32_t number, uint32_t divisor) {
  return coreai::cuda::Divider::by(divisor).quotient(number);
}
