// What the library with autograd gets the captured calls for CUDA tensors from.
#include "cuda/captured.cuh"

extern "C" __attribute__((visibility("default"))) const void* coreai_cuda_capture_functions() {
  static const coreai::CaptureFunctions functions = {&coreai::cuda::capture_simulation, &coreai::cuda::capture_step};
  return &functions;
}
