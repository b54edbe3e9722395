// The kernel that does a step of a single block of elements and keeps it in between: see held_steps.cuh.
//
// A block of threads keeps up to kHeldTiles tiles: the last in registers, those before in shared memory.
#pragma once

#include "cuda/grid.cuh"
#include "cuda/quantize/observe_and_fake_quantize.cuh"

namespace coreai::cuda {

constexpr int kHeldTiles = 3;
constexpr int kTilePacks = kThreads * kUnroll;
constexpr int kHeldBlocks = 4;  // of threads, at least, on a multiprocessor whose shared memory has room for them

struct HeldJob : StepJob {
  WideningKeys* parts;  // of each block of threads
  int64_t numel;
  uint32_t tiles;  // the last may not be whole
};

// Packs kWarp apart; zeros, which are in the range anyway, from pack `left` on, counted from the first.
template <Element kElement>
__device__ __forceinline__ void load_tile(Pack<kElement> (&pack)[kUnroll], const void* from, uint32_t first, int left) {
  const uint4* x = static_cast<const uint4*>(from) + first;
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    pack[i].raw = {};
    if (left > i * kWarp) pack[i].raw = x[i * kWarp];
  }
}
template <Element kElement>
__device__ __forceinline__ void keep_tile(const Pack<kElement> (&pack)[kUnroll], uint4* slot) {
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) slot[i * kWarp] = pack[i].raw;
}
template <Element kElement>
__device__ __forceinline__ void take_tile(Pack<kElement> (&pack)[kUnroll], const uint4* slot) {
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) pack[i].raw = slot[i * kWarp];
}

// The widest range of the threads of a block, for its first thread.
__device__ __forceinline__ WideningKeys widest_of_threads(WideningKeys keys) {
  __shared__ WideningKeys of_warps[kThreads / kWarp];
  const int thread = static_cast<int>(threadIdx.x);
  keys = {__reduce_max_sync(0xffffffffu, keys.low), __reduce_max_sync(0xffffffffu, keys.high)};
  if (thread % kWarp == 0) of_warps[thread / kWarp] = keys;
  __syncthreads();
  if (thread == 0) {
#pragma unroll
    for (int i = 1; i < kThreads / kWarp; ++i) keys.merge(of_warps[i]);
  }
  return keys;
}

// A single block of elements. Each block of threads has a tile at least.
template <class K, Element kElement>
__device__ __forceinline__ void step_held_tensor(const HeldJob& job) {
  using P = Pack<kElement>;
  __shared__ uint4 held[(kHeldTiles - 1) * kTilePacks];
  __shared__ BlockParams<K> of_tensor;
  const uint32_t thread = threadIdx.x, first = thread / kWarp * (kWarp * kUnroll) + thread % kWarp;
  const int64_t begin_of_rest = int64_t{job.packs} * P::kSize;  // less than a byte of the mask
  P pack[kUnroll];
  uint4* slot = held + first;
  uint32_t tile = blockIdx.x;
  auto extremes = Extremes<kElement>::with_zero();
  for (;;) {
    const uint32_t own = tile * kTilePacks + first;
    const int left = static_cast<int>(job.packs - own);
    load_tile(pack, job.input, own, left);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) extremes.take(pack[i]);
    if (tile + gridDim.x >= job.tiles) break;
    keep_tile(pack, slot);
    slot += kTilePacks;
    tile += gridDim.x;
  }
  Range range = extremes.range(), old = {};
  if (thread == 0) {
    if (job.after.update.reads_running()) old = running_range(job.after, kElement, 0);
#pragma unroll 1
    for (int64_t i = begin_of_rest; i < job.numel; ++i) {
      const float value = load_element<kElement>(static_cast<const WordOf<kElement>*>(job.input) + i);
      merge(range, {value, value});
    }
  }
  WideningKeys keys = widest_of_threads(WideningKeys::of(range));
  if (thread == 0) job.parts[blockIdx.x] = keys;
  sync_grid();
  for (uint32_t part = thread; part < gridDim.x; part += kThreads) keys.merge(job.parts[part]);
  keys = widest_of_threads(keys);
  if (thread == 0) {
    const Range next = update_lanes<Lane>(job.after.update, kElement, keys.range(), old);
    const auto chosen = choose<K, kElement>(job.after, next);
    if (blockIdx.x == 0) {
      store_running(job.after, kElement, next, 0);
      store_qparams(chosen, job.after.out, 0);
    }
    of_tensor = params_of<K>(job.affine, chosen);
  }
  __syncthreads();
  const BlockParams<K> params = of_tensor;
  const auto its = [&](int) { return params; };
  for (;;) {
    const uint32_t own = tile * kTilePacks + first;
    const int left = static_cast<int>(job.packs - own);
    quantize_held<K, kElement, kUnroll, uint32_t>(
        job, pack, 1, own, kWarp, [&](int i) { return left > i * kWarp; }, its, its);
    if (tile == blockIdx.x) break;
    tile -= gridDim.x;
    slot -= kTilePacks;
    take_tile(pack, slot);
  }
  if (blockIdx.x == 0 && thread == 0 && begin_of_rest < job.numel) {
    const uint32_t bits = quantize_exactly<K, kElement>(job.input, job.output, begin_of_rest,
                                                        static_cast<int>(job.numel - begin_of_rest), its);
    if (job.mask) job.mask[begin_of_rest / 8] = static_cast<uint8_t>(bits);
  }
}

template <class K, Element kElement>
__global__ void __launch_bounds__(kThreads, kHeldBlocks) step_of_held_tensor(HeldJob job) {
  step_held_tensor<K, kElement>(job);
}

// Host side.

// How many blocks of threads share `tiles` tiles: no more than keep memory busy, if those hold all.
inline int64_t blocks_that_hold(int64_t tiles, int64_t multiprocessors) {
  const int64_t least = (tiles + kHeldTiles - 1) / kHeldTiles, busy = 2 * multiprocessors;
  const int64_t wanted = tiles < busy ? tiles : busy;
  return least > wanted ? least : wanted;
}

template <Element kElement>
int64_t held_tiles(const cpu::FakeQuantize& job) {
  const int64_t tile = int64_t{kTilePacks} * Pack<kElement>::kSize;
  return (job.geometry->numel + tile - 1) / tile;
}

template <Element kElement>
HeldJob held_tensor_job(const cpu::FakeQuantize& job, const AfterRange& after, float* workspace) {
  const int64_t numel = job.geometry->numel;
  const StepJob step = {.input = job.input,
                        .output = job.output,
                        .mask = job.mask,
                        .affine = AffineMap(job.affine),
                        .after = after,
                        .blocks = job.geometry->blocks,
                        .packs = static_cast<uint32_t>(numel / 8 * (8 / Pack<kElement>::kSize)),
                        .shift = 0,
                        .warps = 1};
  return {step, reinterpret_cast<WideningKeys*>(workspace), numel, static_cast<uint32_t>(held_tiles<kElement>(job))};
}

}  // namespace coreai::cuda
