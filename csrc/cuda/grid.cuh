// Kernels whose blocks of threads are all on the GPU at the same time, so that they can wait for each other. CUDA calls
// their launches cooperative: the GPU starts such a grid as a whole or not at all. Graphs capture them like other launches
// (driver_types.h: cudaLaunchAttributeCooperative is valid for graph nodes).
#pragma once

#include "cuda/launch.cuh"

#if !defined(COREAI_EMULATED_THREADS)
#include <cooperative_groups.h>

namespace coreai::cuda {

// All threads of all blocks come here; behind it they see what any of them wrote before.
__device__ __forceinline__ void sync_grid() { cooperative_groups::this_grid().sync(); }

// Blocks of so many threads that a multiprocessor of the current device holds, which is `device`; 0 if a grid cannot be
// started as a whole there. Asked at each launch: it is how the device is set up at that time.
template <class Job>
int64_t blocks_at_once(void (*kernel)(Job), int threads, int32_t device) {
  int starts_whole_grids = 0, blocks = 0;
  cudaError_t error = cudaDeviceGetAttribute(&starts_whole_grids, cudaDevAttrCooperativeLaunch, device);
  if (error == cudaSuccess && starts_whole_grids != 0) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0);
  }
  if (error == cudaSuccess) return blocks;
  cudaGetLastError();  // the kernels that do without say what is wrong, if anything is
  return 0;
}

// Whether the GPU takes the grid: it may have fewer multiprocessors for this stream than the device has. Of other errors
// check_launch() tells.
template <class Job>
bool launch_at_once(void (*kernel)(Job), int64_t blocks, int threads, cudaStream_t stream, Job job) {
  void* arguments[] = {&job};
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
  const cudaError_t error =
      cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, 0, stream);
  if (error != cudaErrorCooperativeLaunchTooLarge && error != cudaErrorNotSupported) return true;
  cudaGetLastError();
  return false;
}

}  // namespace coreai::cuda
#endif
