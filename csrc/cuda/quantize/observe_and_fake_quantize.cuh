// Observe, update, choose and fake-quantize, on a GPU.
//
// Blocks that are runs of whole packs stay in registers between the two looks at them, and memory is read once: short ones
// lie side by side in a warp, whose lanes choose the parameters of different blocks; of longer ones several warps have one,
// or one warp does, and the first warp of the threads chooses for all. A single block that is too large for that,
// columns, and NVFP4 are read once where held_steps.cuh can. Else a single block takes two kernels, of which the second
// merges what the first has found. All others are observed and quantized one after the other.
#pragma once

#include "cuda/quantize/fake_quantize.cuh"
#include "cuda/quantize/observe_range.cuh"

namespace coreai::cuda {

// A range that contains zero, as integers whose larger is the wider: bits of the lower bound with the sign, of the upper
// one without. NaN lies beyond the infinities.
struct WideningKeys {
  uint32_t low, high;

  static __device__ __forceinline__ WideningKeys of(Range range) {
    return {static_cast<uint32_t>(Lane::as_int(range.low)) | 0x80000000u,
            static_cast<uint32_t>(Lane::as_int(range.high)) & 0x7fffffffu};
  }
  __device__ __forceinline__ Range range() const {
    return {Lane::as_float(static_cast<int32_t>(low)), Lane::as_float(static_cast<int32_t>(high))};
  }
  __device__ __forceinline__ void merge(WideningKeys other) {
    low = low > other.low ? low : other.low;
    high = high > other.high ? high : other.high;
  }
  __device__ __forceinline__ WideningKeys of_lane_across(int distance) const {
    return {__shfl_xor_sync(0xffffffffu, low, distance), __shfl_xor_sync(0xffffffffu, high, distance)};
  }
};

struct StepJob {
  const void* input;
  void* output;
  uint8_t* mask;     // null: not wanted
  AffineMap affine;  // whose arrays are those that the parameters are stored in
  AfterRange after;
  int64_t blocks;
  uint32_t packs;  // of a block
  int shift;       // of short ones: there are 1 << shift packs
  int warps;       // of others, that have a block among them: a power of two
};

// The parameters of a block from its range, by a rule that the kernel knows half of.
template <class K, Element kElement>
__device__ __forceinline__ QParamsLanes<Lane> choose(const AfterRange& after, Range range) {
  QParamsRule rule = after.rule;
  rule.format = K::kFormat, rule.rounding = kElement;
  return choose_lanes<Lane, false>(rule, range);
}

template <class K, class Quick = QuickLane>
__device__ __forceinline__ BlockParams<K, Quick> params_of(const AffineMap& a, const QParamsLanes<Lane>& chosen) {
  return BlockParams<K, Quick>::of(a, chosen.scale, chosen.zero_point, chosen.minval);
}

// Packs `stride` apart from `own` on, of which those with valid(i) exist: results and mask are stored. params(i): of pack i,
// looked up by all threads of a warp; exact_params(i), by one. `groups`: after so many of kUnroll there are none, for no
// thread of the warp.
template <class K, Element kElement, int kHeld, class Index, class Valid, class Params, class ExactParams>
__device__ __forceinline__ void quantize_held(const StepJob& job, Pack<kElement> (&pack)[kHeld], int groups, Index own,
                                              Index stride, Valid valid, Params params, ExactParams exact_params) {
  using P = Pack<kElement>;
  constexpr int kGroups = kHeld / kUnroll;
  uint32_t bits[kGroups] = {};
  float all = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (i >= kUnroll && i / kUnroll >= groups) continue;
    const auto p = params(i);
    bits[i / kUnroll] |= quantize_pack<K, kElement>(pack[i], all, [&](int) { return p; }) << (P::kSize * (i % kUnroll));
  }
  if (all == all) {
    uint4* y = static_cast<uint4*>(job.output) + own;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (valid(i)) y[i * stride] = pack[i].raw;
    }
  } else {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      bits[group] = 0;
#pragma unroll 1
      for (int i = 0; i < kUnroll; ++i) {
        const int at = group * kUnroll + i;
        if (!valid(at)) continue;
        const auto p = exact_params(at);
        bits[group] |= quantize_exactly<K, kElement>(job.input, job.output, int64_t{own + at * stride} * P::kSize, P::kSize,
                                                     [&](int) { return p; })
                       << (P::kSize * i);
      }
    }
  }
  if (!job.mask) return;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    if (group > 0 && group >= groups) continue;
    const int first = group * kUnroll;
    const bool exists[kUnroll] = {valid(first), valid(first + 1), valid(first + 2), valid(first + 3)};
    store_bits<kElement, kUnroll>(job.mask + (own + first * stride) / (8 / P::kSize), stride * P::kSize / 8, bits[group],
                                  exists);
  }
}

// Blocks of up to kHeld packs for each thread of `warps` warps.
template <class K, Element kElement, int kHeld>
__device__ __forceinline__ void step_rows(const StepJob& job) {
  using P = Pack<kElement>;
  __shared__ WideningKeys of_warps[kThreads / kWarp];
  __shared__ BlockParams<K> of_teams[kThreads / kWarp];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int teams = kThreads / kWarp / job.warps, team = warp / job.warps;
  const uint32_t stride = static_cast<uint32_t>(job.warps * kWarp);
  const uint32_t place = static_cast<uint32_t>(thread) - static_cast<uint32_t>(team) * stride;
  for (int64_t first = int64_t{blockIdx.x} * teams; first < job.blocks; first += int64_t{gridDim.x} * teams) {
    const int64_t own = (first + team) * job.packs + place;
    const uint32_t packs = first + team < job.blocks ? job.packs : 0;
    const int groups = static_cast<int>((job.packs + stride * kUnroll - 1) / (stride * kUnroll));
    const uint4* x = static_cast<const uint4*>(job.input) + own;
    P pack[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      pack[i].raw = {};  // zero is in the range anyway
      if (place + i * stride < packs) pack[i].raw = x[i * stride];
    }
    auto extremes = Extremes<kElement>::with_zero();
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i < kUnroll || i / kUnroll < groups) extremes.take(pack[i]);
    }
    WideningKeys keys = WideningKeys::of(extremes.range());
    keys = {__reduce_max_sync(0xffffffffu, keys.low), __reduce_max_sync(0xffffffffu, keys.high)};
    if (lane == 0) of_warps[warp] = keys;
    __syncthreads();
    if (thread < teams && first + thread < job.blocks) {
      WideningKeys all = of_warps[thread * job.warps];
#pragma unroll 1
      for (int i = 1; i < job.warps; ++i) all.merge(of_warps[thread * job.warps + i]);
      const Range range = next_range(job.after, kElement, all.range(), first + thread);
      const auto chosen = choose<K, kElement>(job.after, range);
      store_qparams(chosen, job.after.out, first + thread);
      of_teams[thread] = params_of<K>(job.affine, chosen);
    }
    __syncthreads();
    const BlockParams<K> params = of_teams[team];
    quantize_held<K, kElement, kHeld, int64_t>(
        job, pack, groups, own, stride, [&](int i) { return place + i * stride < packs; }, [&](int) { return params; },
        [&](int) { return params; });
  }
}

// Of two blocks that a lane and its neighbour at `distance` have in common, each gets one: the half of it that it has merged
// with the half that the other gives for its own.
__device__ __forceinline__ WideningKeys trade(WideningKeys a, WideningKeys b, int distance) {
  const bool keeps_second = (threadIdx.x & static_cast<uint32_t>(distance)) != 0;
  const WideningKeys given = {keeps_second ? a.low : b.low, keeps_second ? a.high : b.high};
  WideningKeys kept = {keeps_second ? b.low : a.low, keeps_second ? b.high : a.high};
  kept.merge(given.of_lane_across(distance));
  return kept;
}

// A tile of step_short_runs, which is whole or the tensor's last.
template <class K, Element kElement, int kHeld, class Quick, bool kWhole>
__device__ __forceinline__ void step_short_tile(const StepJob& job, uint32_t tile) {
  using P = Pack<kElement>;
  constexpr uint32_t kTile = kThreads * kHeld;
  const uint32_t lane = threadIdx.x % kWarp, packs = job.packs;
  const uint32_t blocks = static_cast<uint32_t>(job.blocks), all_packs = blocks * packs;
  const bool has_zero_points = job.after.rule.scheme == Scheme::kAsymmetric;
  const uint32_t own = tile * kTile + threadIdx.x / kWarp * (kWarp * kHeld) + lane;
  const int left = static_cast<int>(all_packs - own);
  const auto valid = [&](int i) { return kWhole || left > i * kWarp; };
  const uint4* x = static_cast<const uint4*>(job.input) + own;
  P pack[kHeld];
  WideningKeys keys[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    pack[i].raw = {};
    if (valid(i)) pack[i].raw = x[i * kWarp];
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    auto extremes = Extremes<kElement>::with_zero();
    extremes.take(pack[i]);
    keys[i] = WideningKeys::of(extremes.range());
  }
  // Of kHeld lanes each gets one pack's block.
#pragma unroll
  for (int distance = 1; distance < kHeld; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kHeld / 2; ++i) {
      if (i < kHeld / (2 * distance)) keys[i] = trade(keys[2 * i], keys[2 * i + 1], distance);
    }
  }
  WideningKeys its = keys[0];
#pragma unroll
  for (int distance = kHeld; distance < kWarp; distance *= 2) {
    if (static_cast<uint32_t>(distance) < packs) its.merge(its.of_lane_across(distance));
  }
  const uint32_t block = (own + lane % kHeld * kWarp) >> job.shift;
  const bool exists = kWhole || block < blocks;
  Range batch = its.range(), old = batch;
  if (job.after.update.reads_running() && exists) old = running_range(job.after, kElement, block);
  __syncwarp();  // others may have read it, who have the same block
  const Range range = update_lanes<Lane>(job.after.update, kElement, batch, old);
  const auto chosen = choose<K, kElement>(job.after, range);
  if (exists && (lane & (packs - 1)) < kHeld) {
    store_running(job.after, kElement, range, block);
    store_qparams(chosen, job.after.out, block);
  }
  __syncwarp();  // the others may read it
  const auto params = params_of<K, Quick>(job.affine, chosen);
  quantize_held<K, kElement, kHeld, uint32_t>(
      job, pack, kHeld / kUnroll, own, kWarp, valid,
      [&](int i) { return params.of_lane(static_cast<int>(lane / kHeld * kHeld) + i, has_zero_points); },
      [&](int i) { return BlockParams<K, Quick>::load(job.affine, (own + i * kWarp) >> job.shift); });
}

// Blocks of `packs` packs: a power of two, at least kHeld, which each thread has, and no more than a warp has lanes.
// `Quick`: PowerLane, where the rule makes scales powers of two.
template <class K, Element kElement, int kHeld, class Quick>
__device__ __forceinline__ void step_short_runs(const StepJob& job) {
  constexpr uint32_t kTile = kThreads * kHeld;
  const uint32_t packs = static_cast<uint32_t>(job.blocks) * job.packs, whole = packs / kTile;
  uint32_t tile = blockIdx.x;
  for (; tile < whole; tile += gridDim.x) step_short_tile<K, kElement, kHeld, Quick, true>(job, tile);
  if (tile * kTile < packs) step_short_tile<K, kElement, kHeld, Quick, false>(job, tile);
}

struct TensorStepJob {
  RunsJob runs;
  AfterRange after;
  Partials partials;
  const float* old;  // two bounds
  int64_t parts;
};

// A single block, whose range has been found in parts.
template <class K, Element kElement>
__device__ __forceinline__ void step_tensor(const TensorStepJob& job) {
  Range range = no_range();
  for (int64_t part = threadIdx.x; part < job.parts; part += kThreads) {
    merge(range, {job.partials.low[part], job.partials.high[part]});
  }
  range = range_of_threads(range);
  Range old = range;
  if (job.after.update.reads_running()) old = {job.old[0], job.old[1]};
  range = update_lanes<Lane>(job.after.update, kElement, range, old);
  const auto chosen = choose<K, kElement>(job.after, range);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    store_running(job.after, kElement, range, 0);
    store_qparams(chosen, job.after.out, 0);
  }
  quantize_runs<K, kElement, Runs::kOne>(job.runs, params_of<K>(job.runs.affine, chosen));
}

// The kernels are no more than these. What they do for one kind of step alone, benchmarks/gpu_model counts.
template <class K, Element kElement, int kHeld>
__global__ void __launch_bounds__(kThreads, kHeld > kUnroll ? 2 : 4) step_of_rows(StepJob job) {
  step_rows<K, kElement, kHeld>(job);
}

template <class K, Element kElement, int kHeld, class Quick>
__global__ void __launch_bounds__(kThreads, kHeld > kUnroll ? 2 : 3) step_of_short_runs(StepJob job) {
  step_short_runs<K, kElement, kHeld, Quick>(job);
}

template <class K, Element kElement>
__global__ void __launch_bounds__(kThreads) step_of_tensor(TensorStepJob job) {
  step_tensor<K, kElement>(job);
}

// Host side.

enum class StepWay { kShortRuns, kRows, kTensor, kOneByOne };

constexpr int kFewHeld = kUnroll, kManyHeld = 2 * kUnroll;
// A single block of so many elements keeps one multiprocessor as long as a second launch takes.
constexpr int64_t kMostInOneBlock = 16384;

// `pack`: elements of one.
inline StepWay way_of_step(const cpu::Geometry& g, const QParamsRule& rule, int pack, bool aligned) {
  const bool by_runs = aligned && g.outer_axes == 0 && g.numel <= kMostInRuns;
  // Where the scale of a block depends on all blocks, they have to be observed first.
  if (!by_runs || rule.scale_format == ScaleFormat::kE4M3) return StepWay::kOneByOne;
  if (g.blocks == 1 && g.numel > kMostInOneBlock) return StepWay::kTensor;
  if (g.run % 8 != 0) return StepWay::kOneByOne;
  const int64_t packs = g.run / pack;
  if (is_power_of_two(packs) && packs >= kUnroll && packs <= kWarp && g.blocks > 1) return StepWay::kShortRuns;
  return packs <= kManyHeld * kThreads ? StepWay::kRows : StepWay::kOneByOne;
}

// Numbers of workspace that queue_step() needs.
inline int64_t workspace_of_step(const cpu::Geometry& g, StepWay way, const ObservePlan& plan) {
  if (way == StepWay::kTensor) return 2 * plan.parts + 2;
  if (way != StepWay::kOneByOne) return 0;
  return plan.workspace(g) + 2 * g.blocks + blocks_of_largest(g.blocks);
}

// Queues the kernels for a tensor that is not empty, but for those that quantize if it is done one by one. `after`: with
// all but where ranges are kept until parameters are chosen.
template <class Stream>
void queue_step(const cpu::FakeQuantize& job, AfterRange after, StepWay way, const ObservePlan& plan, float* workspace,
                int64_t most_blocks, Stream stream) {
  const cpu::Geometry& g = *job.geometry;
  if (way == StepWay::kOneByOne) {
    float* ranges = workspace + plan.workspace(g);
    after.next_low = ranges, after.next_high = ranges + g.blocks;
    after.chooses = after.rule.scale_format != ScaleFormat::kE4M3;
    queue_observe(g, job.element, job.input, plan, after, workspace, nullptr, most_blocks, stream);
    if (after.chooses) return;
    return queue_choose(after.rule, after.next_low, after.next_high, g.blocks, after.out, ranges + 2 * g.blocks, most_blocks,
                        stream);
  }
  float* old = way == StepWay::kTensor ? workspace + 2 * plan.parts : nullptr;
  if (way == StepWay::kTensor) queue_observe(g, job.element, job.input, plan, after, workspace, old, most_blocks, stream);
  with_16_or_32_bits(job.element, [&](auto element) {
    constexpr Element kElement = decltype(element)::value;
    with_kind(job.affine.format, job.affine.offset != nullptr, [&](auto kind) {
      using K = decltype(kind);
      if (way == StepWay::kTensor) {
        const RunsJob runs = runs_job<kElement>(job);
        auto* kernel = &step_of_tensor<K, kElement>;
        COREAI_LAUNCH(kernel, blocks_of_tiles(runs.tiles, most_blocks), kThreads, stream,
                      TensorStepJob{runs, after, {workspace, workspace + plan.parts}, old, plan.parts});
        return;
      }
      const int64_t packs = g.run / Pack<kElement>::kSize;
      StepJob step = {.input = job.input,
                      .output = job.output,
                      .mask = job.mask,
                      .affine = AffineMap(job.affine),
                      .after = after,
                      .blocks = g.blocks,
                      .packs = static_cast<uint32_t>(packs),
                      .shift = 0,
                      .warps = 1};
      if (way == StepWay::kShortRuns) {
        // The fewer elements packs have, the more of them share what a block takes.
        constexpr int kMore = kElement == Element::kFloat32 ? kManyHeld : kFewHeld;
        const bool by_powers = after.rule.scale_format == ScaleFormat::kE8M0;
        const bool is_more = packs >= kMore;
        auto* kernel = !is_more    ? &step_of_short_runs<K, kElement, kFewHeld, QuickLane>
                       : by_powers ? &step_of_short_runs<K, kElement, kMore, PowerLane>
                                   : &step_of_short_runs<K, kElement, kMore, QuickLane>;
        while (int64_t{1} << step.shift < packs) ++step.shift;
        const int64_t tile = kThreads * (is_more ? kMore : kFewHeld);
        COREAI_LAUNCH(kernel, blocks_of_tiles((g.blocks * packs + tile - 1) / tile, most_blocks), kThreads, stream, step);
        return;
      }
      constexpr int kWarps = kThreads / kWarp;
      while (step.warps < kWarps && int64_t{step.warps} * kWarp * kFewHeld < packs) step.warps *= 2;
      const bool is_few = int64_t{step.warps} * kWarp * kFewHeld >= packs;
      auto* kernel = is_few ? &step_of_rows<K, kElement, kFewHeld> : &step_of_rows<K, kElement, kManyHeld>;
      const int64_t teams = kWarps / step.warps;
      COREAI_LAUNCH(kernel, blocks_of_tiles((g.blocks + teams - 1) / teams, most_blocks), kThreads, stream, step);
    });
  });
}

}  // namespace coreai::cuda
