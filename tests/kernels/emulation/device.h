// A GPU of one multiprocessor whose memory is the CPU's: operators for CUDA tensors take those of the CPU, under a name of
// their own.
#pragma once

#include <cstdint>

#define COREAI_GPU_LIBRARY coreai_emulated, CPU

namespace coreai::cuda {
namespace {

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline int current_stream(int32_t) { return 0; }
inline int64_t multiprocessors(int32_t) { return 1; }
inline void check_launch(const char*) {}

}  // namespace
}  // namespace coreai::cuda
