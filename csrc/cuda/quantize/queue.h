// What one library of operators asks of another's kernels: each kernel is compiled once.
#pragma once

#include "cpu/kernels.h"
#include "cuda/launch.cuh"

namespace coreai::cuda {

#if defined(COREAI_EMULATED_THREADS)
using Stream = int;
#else
using Stream = cudaStream_t;
#endif

// See queue_fake_quantize.
void queue_simulation(const cpu::FakeQuantize& job, int64_t most_blocks, Stream stream);

}  // namespace coreai::cuda
