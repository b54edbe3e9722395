// From ranges of blocks to their parameters, a block a thread.
#pragma once

#include "cpu/kernels.h"
#include "cuda/quantize/extremes.cuh"

namespace coreai::cuda {

__device__ __forceinline__ void store_qparams(const QParamsLanes<Lane>& chosen, const cpu::QParams& out, int64_t block) {
  out.scale[block] = chosen.scale;
  if (out.zero_point) out.zero_point[block] = chosen.zero_point;
  if (out.minval) out.minval[block] = chosen.minval;
}

// What becomes of the range of a block. All arrays are in memory order of the blocks.
struct AfterRange {
  Element element;  // of the input, and of the range that is kept
  bool is_step;     // else the range itself is what is wanted
  bool chooses;     // parameters, when the range of the block is known
  UpdateRule update;
  QParamsRule rule;
  cpu::QParams out;
  void* kept_low;  // the running range, before and after; or the range wanted. Null: not kept
  void* kept_high;
  float* next_low;  // if the parameters are chosen later: the range that they follow from
  float* next_high;
};

// `element`: that of `after`, which the compiler may know.
__device__ __forceinline__ Range running_range(const AfterRange& after, Element element, int64_t block) {
  return {load_as(element, after.kept_low, block), load_as(element, after.kept_high, block)};
}

__device__ __forceinline__ void store_running(const AfterRange& after, Element element, Range range, int64_t block) {
  if (!after.kept_low) return;
  store_as(element, after.kept_low, block, range.low);
  store_as(element, after.kept_high, block, range.high);
}

// The range that the parameters of a block follow from, after a batch; the running range is written.
__device__ __forceinline__ Range next_range(const AfterRange& after, Element element, Range batch, int64_t block) {
  const Range old = after.update.reads_running() ? running_range(after, element, block) : batch;
  const Range range = update_lanes<Lane>(after.update, element, batch, old);
  store_running(after, element, range, block);
  return range;
}

// One thread for each block.
__device__ __forceinline__ void finish_range(const AfterRange& after, Range range, int64_t block) {
  if (!after.is_step) {
    // Which zero is found is a matter of order; the sum makes it one.
    store_as(after.element, after.kept_low, block, Lane::add(range.low, 0.0f));
    store_as(after.element, after.kept_high, block, Lane::add(range.high, 0.0f));
    return;
  }
  range = next_range(after, after.element, range, block);
  if (after.chooses) {
    store_qparams(choose_lanes<Lane>(after.rule, range), after.out, block);
  } else {
    after.next_low[block] = range.low;
    after.next_high[block] = range.high;
  }
}

// The largest magnitudes of ranges that contain zero, of so many blocks of threads one each.
template <class = void>
__global__ void __launch_bounds__(kThreads)
    largest_magnitudes(const float* low, const float* high, int64_t blocks, float* largest) {
  float own = 0.0f;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < blocks; i += int64_t{gridDim.x} * kThreads) {
    own = QuickLane::max(own, largest_magnitude<Lane>({low[i], high[i]}));
  }
  const Range range = range_of_threads({own, own});
  if (threadIdx.x == 0) largest[blockIdx.x] = range.high;
}

struct ChooseJob {
  QParamsRule rule;
  const float* low;
  const float* high;
  int64_t blocks;
  cpu::QParams out;
  const float* largest;  // magnitudes, of scales with two levels
  int parts;             // so many
};

template <class = void>
__global__ void __launch_bounds__(kThreads) choose_parameters(ChooseJob job) {
  float of_tensor = 0.0f;
  if (job.rule.scale_format == ScaleFormat::kE4M3) {
    float own = 0.0f;
    for (int i = static_cast<int>(threadIdx.x); i < job.parts; i += kThreads) own = QuickLane::max(own, job.largest[i]);
    of_tensor = tensor_scale_of(job.rule, range_of_threads({own, own}).high);
  }
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < job.blocks; i += int64_t{gridDim.x} * kThreads) {
    store_qparams(choose_lanes<Lane>(job.rule, {job.low[i], job.high[i]}, of_tensor), job.out, i);
  }
}

// Host side.

// Largest magnitudes that there are room for: of so many blocks of threads.
constexpr int64_t kMostLargest = 1024;

inline int64_t blocks_of_largest(int64_t blocks) {
  const int64_t wanted = blocks_for(blocks);
  return wanted < kMostLargest ? wanted : kMostLargest;
}

// Queues the choice of the parameters of `blocks` > 0 blocks. `workspace`: blocks_of_largest(blocks) numbers, if scales
// have two levels.
template <class Stream>
void queue_choose(const QParamsRule& rule, const float* low, const float* high, int64_t blocks, const cpu::QParams& out,
                  float* workspace, int64_t most_blocks, Stream stream) {
  const int64_t parts = blocks_of_largest(blocks);
  if (rule.scale_format == ScaleFormat::kE4M3) {
    COREAI_LAUNCH(largest_magnitudes<>, parts, kThreads, stream, low, high, blocks, workspace);
  }
  COREAI_LAUNCH(choose_parameters<>, blocks_of_tiles(blocks_for(blocks), most_blocks), kThreads, stream,
                ChooseJob{rule, low, high, blocks, out, workspace, static_cast<int>(parts)});
}

}  // namespace coreai::cuda
