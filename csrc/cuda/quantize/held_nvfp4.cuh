// The kernel that does a step of NVFP4, e2m1 in blocks of 16 whose scales depend on the largest magnitude of all, and keeps
// what it has read in between: see held_steps.cuh.
//
// Blocks lie side by side in a warp. Of each one lane finds the magnitude, which takes the place of its range, and the
// parameters. The lane keeps the magnitudes of its last tile, and those before are in shared memory.
#pragma once

#include "cuda/quantize/held_tensor.cuh"

namespace coreai::cuda {

constexpr int kNVFP4Block = 16;

template <Element kElement>
__device__ __forceinline__ void step_held_nvfp4(const HeldJob& job) {
  using K = Kind<Format::kE2M1>;
  using P = Pack<kElement>;
  constexpr int kLanes = kNVFP4Block / P::kSize;  // that have a block among them, a pack each
  constexpr int kOwn = kUnroll / kLanes;          // blocks of a lane, of a tile
  static_assert(kLanes * P::kSize == kNVFP4Block && kOwn * kLanes == kUnroll);
  __shared__ uint4 held[(kHeldTiles - 1) * kTilePacks];
  __shared__ float held_largest[(kHeldTiles - 1) * kOwn * kThreads];
  __shared__ float of_tensor;
  const uint32_t thread = threadIdx.x, lane = thread % kWarp, first = thread / kWarp * (kWarp * kUnroll) + lane;
  P pack[kUnroll];
  float largest[kOwn];
  uint4* slot = held + first;
  float* slot_of_largest = held_largest + thread;
  uint32_t tile = blockIdx.x;
  const auto blocks = static_cast<uint32_t>(job.blocks);
  WideningKeys widest = {0, 0};
  // Block i of the lane is that of pack i * kLanes + lane % kLanes of the first lane of kLanes.
  const auto block_of = [&](uint32_t own, int i) {
    return (own + (static_cast<uint32_t>(i * kLanes) + lane % kLanes) * kWarp) / kLanes;
  };
  for (;;) {
    const uint32_t own = tile * kTilePacks + first;
    const int left = static_cast<int>(job.packs - own);
    load_tile(pack, job.input, own, left);
    WideningKeys keys[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      auto extremes = Extremes<kElement>::with_zero();
      extremes.take(pack[i]);
      keys[i] = WideningKeys::of(extremes.range());
    }
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
#pragma unroll
      for (int i = 0; i < kUnroll / 2; ++i) {
        if (i < kUnroll / (2 * distance)) keys[i] = trade(keys[2 * i], keys[2 * i + 1], distance);
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const uint32_t block = block_of(own, i);
      const bool exists = block < blocks;
      const Range batch = keys[i].range();
      const Range old = job.after.update.reads_running() && exists ? running_range(job.after, kElement, block) : batch;
      const Range next = update_lanes<Lane>(job.after.update, kElement, batch, old);
      if (exists) store_running(job.after, kElement, next, block);
      largest[i] = exists ? largest_magnitude<Lane>(next) : 0.0f;
      widest.merge(WideningKeys::of({0.0f, largest[i]}));
    }
    if (tile + gridDim.x >= job.tiles) break;
    keep_tile(pack, slot);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) slot_of_largest[i * kThreads] = largest[i];
    slot += kTilePacks;
    slot_of_largest += kOwn * kThreads;
    tile += gridDim.x;
  }
  widest = widest_of_threads(widest);
  if (gridDim.x > 1) {
    if (thread == 0) job.parts[blockIdx.x] = widest;
    sync_grid();
    for (uint32_t part = thread; part < gridDim.x; part += kThreads) widest.merge(job.parts[part]);
    widest = widest_of_threads(widest);
  }
  if (thread == 0) of_tensor = tensor_scale_of(job.after.rule, widest.range().high);
  __syncthreads();
  const float tensor_scale = of_tensor;
  for (;;) {
    const uint32_t own = tile * kTilePacks + first;
    const int left = static_cast<int>(job.packs - own);
    BlockParams<K> params[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const uint32_t block = block_of(own, i);
      const QParamsLanes<Lane> chosen = {two_level_scale<Lane>(job.after.rule, largest[i], tensor_scale), 0, 0.0f};
      if (block < blocks) store_qparams(chosen, job.after.out, block);
      params[i] = params_of<K>(job.affine, chosen);
    }
    __syncwarp();  // the others may read them
    quantize_held<K, kElement, kUnroll, uint32_t>(
        job, pack, 1, own, kWarp, [&](int i) { return left > i * kWarp; },
        [&](int i) { return params[i / kLanes].of_lane(static_cast<int>(lane / kLanes * kLanes) + i % kLanes); },
        [&](int i) { return BlockParams<K>::load(job.affine, (own + static_cast<uint32_t>(i) * kWarp) / kLanes); });
    if (tile == blockIdx.x) break;
    tile -= gridDim.x;
    slot -= kTilePacks;
    slot_of_largest -= kOwn * kThreads;
    take_tile(pack, slot);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) largest[i] = slot_of_largest[i * kThreads];
  }
}

template <Element kElement>
__global__ void __launch_bounds__(kThreads, kHeldBlocks) step_of_held_nvfp4(HeldJob job) {
  step_held_nvfp4<kElement>(job);
}

// Host side.

// Whether a step is one of NVFP4 whose blocks are runs of whole packs.
inline bool is_nvfp4(const cpu::FakeQuantize& job, const QParamsRule& rule) {
  const cpu::Geometry& g = *job.geometry;
  return rule.scale_format == ScaleFormat::kE4M3 && job.affine.format == Format::kE2M1 && g.outer_axes == 0 &&
         g.run == kNVFP4Block;
}

}  // namespace coreai::cuda
