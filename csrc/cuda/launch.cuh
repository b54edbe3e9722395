// CUDA's keywords and launches, or those that the CPU emulates in tests/kernels/emulation.
#pragma once

#include <cstdint>
#include <vector>

#if defined(COREAI_EMULATED_THREADS)
#include "emulation/cuda_emulation.h"
#else
#include <cuda_runtime.h>
#define COREAI_LAUNCH(kernel, blocks, threads, stream, ...) \
  (kernel)<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(__VA_ARGS__)
#endif

namespace coreai::cuda {

__host__ __device__ __forceinline__ bool is_aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

}  // namespace coreai::cuda
