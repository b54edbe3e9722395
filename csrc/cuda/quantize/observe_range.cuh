// Ranges of blocks on a GPU, and what becomes of them: see AfterRange.
//
// Memory is read once. What one block of threads is given of a block of elements it reduces; where blocks are few and large,
// several are given parts of one, and a second kernel merges those.
#pragma once

#include "cuda/quantize/qparams.cuh"

namespace coreai::cuda {

// Ranges of parts of blocks, [parts, blocks].
struct Partials {
  float* low;
  float* high;
};

struct ObserveJob {
  const void* input;
  cpu::Geometry geometry;
  AfterRange after;
  Partials partials;
  bool finishes;  // here what becomes of ranges; else there are parts, to be merged
  float* old;     // receives the running range, of a single block whose parts a kernel merges that overwrites it
  int64_t parts;  // of each block
  int64_t chunk;  // of a part: packs, elements or rows, as the kernel takes them
  int64_t units;  // of a block
  int width;      // packs across, of columns; else lanes, or warps
};

// The range of one part of a block.
__device__ __forceinline__ void give_range(const ObserveJob& job, Range range, int64_t block, int64_t part) {
  if (job.finishes) return finish_range(job.after, range, block);
  job.partials.low[part * job.geometry.blocks + block] = range.low;
  job.partials.high[part * job.geometry.blocks + block] = range.high;
}

// Blocks that are runs of `width` packs, a power of two up to a warp's lanes.
template <Element kElement>
__global__ void __launch_bounds__(kThreads) observe_short_runs(ObserveJob job) {
  using P = Pack<kElement>;
  constexpr int64_t kTile = kThreads * kUnroll;
  const int64_t packs = job.geometry.numel / P::kSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t first = static_cast<int64_t>(threadIdx.x) / kWarp * (kWarp * kUnroll) + lane;
  for (int64_t tile = blockIdx.x; tile * kTile < packs; tile += gridDim.x) {
    const int64_t own = tile * kTile + first;
    P pack[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      pack[i].raw = {};
      if (own + i * kWarp < packs) pack[i].raw = static_cast<const uint4*>(job.input)[own + i * kWarp];
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      Extremes<kElement> extremes;
      extremes.take(pack[i]);
      const Range range = range_of_lanes(extremes.range(), job.width);
      const int64_t at = own + i * kWarp;
      if (lane % job.width == 0 && at < packs) finish_range(job.after, range, at / job.width);
    }
  }
}

// First element of a block, and where its `segment`-th run begins from there.
__device__ __forceinline__ int64_t first_of_block(const cpu::Geometry& g, int64_t block) {
  int64_t rest = block / g.columns, row = 0, rows = 1;
  for (int axis = g.outer_axes - 1; axis >= 0; --axis) {
    if (g.outer[axis].stride != 0) row += rest % g.outer[axis].size * rows, rest /= g.outer[axis].size;
    rows *= g.outer[axis].size;
  }
  return (row * g.columns + block % g.columns) * g.run;
}
__device__ __forceinline__ int64_t offset_of_run(const cpu::Geometry& g, int64_t segment) {
  int64_t row = 0, rows = 1;
  for (int axis = g.outer_axes - 1; axis >= 0; --axis) {
    if (g.outer[axis].stride == 0) row += segment % g.outer[axis].size * rows, segment /= g.outer[axis].size;
    rows *= g.outer[axis].size;
  }
  return row * g.columns * g.run;
}

// Any blocks: a part for each team, which is a warp or, if `width` is not 1, a block of threads. A unit is a pack, which
// runs have to be whole numbers of, or an element.
template <Element kElement, bool kByPacks>
__global__ void __launch_bounds__(kThreads, 3) observe_blocks(ObserveJob job) {
  using P = Pack<kElement>;
  const cpu::Geometry& g = job.geometry;
  constexpr int kUnit = kByPacks ? P::kSize : 1;
  const bool by_warps = job.width == 1;
  const int team = by_warps ? kWarp : kThreads, teams = kThreads / team;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t run = g.run / kUnit, parts = g.blocks * job.parts;
  const bool one_run = job.units == run;
  if (job.old && blockIdx.x == 0 && thread < 2) {
    job.old[thread] = load_as(job.after.element, thread == 0 ? job.after.kept_low : job.after.kept_high, 0);
  }
  // Whole blocks of threads go around: they wait for each other.
  for (int64_t group = blockIdx.x; group * teams < parts; group += gridDim.x) {
    const int64_t item = group * teams + thread / team;
    const bool exists = item < parts;
    const int64_t block = exists ? item / job.parts : 0, part = exists ? item % job.parts : 0;
    const int64_t begin = part * job.chunk, last = begin + job.chunk < job.units ? begin + job.chunk : job.units;
    const int64_t end = exists ? last : 0;
    const int64_t first = first_of_block(g, block);
    Range range = no_range();
    const auto place = [&](int64_t unit) {
      return one_run ? first + unit * kUnit : first + offset_of_run(g, unit / run) + unit % run * kUnit;
    };
    const WordOf<kElement>* x = static_cast<const WordOf<kElement>*>(job.input);
    int64_t unit = begin + thread % team;
    if constexpr (kByPacks) {
      Extremes<kElement> extremes;
      for (; unit + (kUnroll - 1) * team < end; unit += kUnroll * team) {
        P pack[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) pack[i] = P::load(x + place(unit + i * team));
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) extremes.take(pack[i]);
      }
      for (; unit < end; unit += team) extremes.take(P::load(x + place(unit)));
      range = extremes.range();
    } else {
      for (; unit < end; unit += team) {
        const float value = load_element<kElement>(x + place(unit));
        merge(range, {value, value});
      }
    }
    range = by_warps ? range_of_lanes(range, kWarp) : range_of_threads(range);
    if (exists && thread % team == 0) give_range(job, range, block, part);
  }
}

// Each element of a row is a block of its own, which so many `units` of rows share that follow each other. Threads have
// `width` packs of columns among them, a power of two, and as many rows at a time as that leaves.
template <Element kElement>
__global__ void __launch_bounds__(kThreads) observe_columns(ObserveJob job) {
  using P = Pack<kElement>;
  __shared__ uint4 lows[kThreads], highs[kThreads];
  const int64_t columns = job.geometry.columns, packs = columns / P::kSize;
  const int thread = static_cast<int>(threadIdx.x), width = job.width, rows = kThreads / width;
  const int64_t tiles = (packs + width - 1) / width;
  const int64_t tile = blockIdx.x % tiles, part = blockIdx.x / tiles % job.parts, group = blockIdx.x / tiles / job.parts;
  const int64_t begin = part * job.chunk, end = begin + job.chunk < job.units ? begin + job.chunk : job.units;
  const int64_t own = tile * width + thread % width;
  ColumnExtremes<kElement> found;
  if (own < packs) {
    const uint4* x = static_cast<const uint4*>(job.input) + group * job.units * packs + own;
    int64_t row = begin + thread / width;
    for (; row + (kUnroll - 1) * rows < end; row += kUnroll * rows) {
      uint4 raw[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) raw[i] = x[(row + i * rows) * packs];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) found.take(raw[i], raw[i]);
    }
    for (; row < end; row += rows) found.take(x[row * packs], x[row * packs]);
  }
  lows[thread] = found.lowest();
  highs[thread] = found.highest();
  __syncthreads();
  // Halves of the rows at a time are merged into the others.
  for (int left = rows / 2; left > 0; left /= 2) {
    if (thread / width < left) {
      found.take(lows[thread + left * width], highs[thread + left * width]);
      lows[thread] = found.lowest();
      highs[thread] = found.highest();
    }
    __syncthreads();
  }
  const auto* lowest = reinterpret_cast<const WordOf<kElement>*>(lows);
  const auto* highest = reinterpret_cast<const WordOf<kElement>*>(highs);
  for (int i = thread; i < width * P::kSize; i += kThreads) {
    const int64_t column = tile * width * P::kSize + i;
    if (column >= columns) continue;
    const Range range = {load_element<kElement>(lowest + i), load_element<kElement>(highest + i)};
    give_range(job, range, group * columns + column, part);
  }
}

// Merges the parts of blocks: a block for each warp.
template <class = void>
__global__ void __launch_bounds__(kThreads) merge_parts(ObserveJob job) {
  const int64_t blocks = job.geometry.blocks;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t first = int64_t{blockIdx.x} * (kThreads / kWarp); first < blocks; first += gridDim.x * (kThreads / kWarp)) {
    const int64_t block = first + static_cast<int>(threadIdx.x) / kWarp;
    Range range = no_range();
    for (int64_t part = lane; block < blocks && part < job.parts; part += kWarp) {
      merge(range, {job.partials.low[part * blocks + block], job.partials.high[part * blocks + block]});
    }
    range = range_of_lanes(range, kWarp);
    if (lane == 0 && block < blocks) finish_range(job.after, range, block);
  }
}

// Host side.

// How a tensor is observed.
struct ObservePlan {
  enum class Kind { kShortRuns, kPacks, kElements, kColumns } kind;
  int64_t parts, chunk, units, launched;  // blocks of threads
  int width;

  // Numbers of workspace.
  int64_t workspace(const cpu::Geometry& g) const { return parts > 1 ? 2 * parts * g.blocks : 0; }
};

inline bool is_power_of_two(int64_t x) { return x > 0 && (x & (x - 1)) == 0; }

// Whether rows of blocks that are single columns follow each other as observe_columns takes them.
inline bool is_by_columns(const cpu::Geometry& g) {
  if (g.run != 1 || g.columns % 8 != 0 || g.outer_axes < 1 || g.outer_axes > 2) return false;
  if (g.outer[g.outer_axes - 1].stride != 0) return false;
  return g.outer_axes == 1 || g.outer[0].stride == g.columns;
}

// Of a tensor that is not empty.
inline ObservePlan plan_observe(const cpu::Geometry& g, int pack, bool aligned, int64_t most_blocks) {
  using Kind = ObservePlan::Kind;
  ObservePlan plan = {Kind::kElements, 1, 1, g.numel / g.blocks, 1, 1};
  // Parts of no less than `least` units, so many that all blocks of threads have one.
  const auto split = [&](int64_t items, int64_t least) {
    const int64_t wanted = most_blocks / items, most = (plan.units + least - 1) / least;
    plan.parts = wanted < 1 ? 1 : wanted < most ? wanted : most;
    plan.chunk = (plan.units + plan.parts - 1) / plan.parts;
    plan.parts = (plan.units + plan.chunk - 1) / plan.chunk;
  };
  if (aligned && is_by_columns(g)) {
    plan.kind = Kind::kColumns;
    plan.units = g.outer[g.outer_axes - 1].size;
    while (plan.width < kWarp && plan.width < g.columns / pack) plan.width *= 2;
    const int64_t tiles = (g.columns / pack + plan.width - 1) / plan.width * (g.blocks / g.columns);
    split(tiles, 8 * (kThreads / plan.width));
    plan.launched = tiles * plan.parts;
    return plan;
  }
  const bool by_packs = aligned && g.run % pack == 0;
  if (by_packs) {
    plan.kind = Kind::kPacks;
    plan.units /= pack;
    if (g.outer_axes == 0 && is_power_of_two(plan.units) && plan.units <= kWarp) {
      plan.kind = Kind::kShortRuns;
      plan.width = static_cast<int>(plan.units);
      plan.launched = blocks_of_tiles((g.numel / pack + kThreads * kUnroll - 1) / (kThreads * kUnroll), most_blocks);
      return plan;
    }
  }
  const bool by_warps = plan.units <= kWarp * kUnroll * 4 && g.blocks >= kThreads / kWarp;
  plan.width = by_warps ? 1 : kThreads / kWarp;
  plan.chunk = plan.units;
  if (!by_warps) split(g.blocks, 2 * kThreads * kUnroll);
  const int64_t teams = by_warps ? kThreads / kWarp : 1;
  plan.launched = blocks_of_tiles((g.blocks * plan.parts + teams - 1) / teams, most_blocks);
  return plan;
}

// Queues the kernels that observe a tensor which is not empty. `workspace`: what the plan says. `old`: two numbers more, if
// parts are not to be merged here, but whoever does so needs the running range as it was.
template <class Stream>
void queue_observe(const cpu::Geometry& g, Element element, const void* input, const ObservePlan& plan,
                   const AfterRange& after, float* workspace, float* old, int64_t most_blocks, Stream stream) {
  using Kind = ObservePlan::Kind;
  const ObserveJob job = {.input = input,
                          .geometry = g,
                          .after = after,
                          .partials = {workspace, workspace + plan.parts * g.blocks},
                          .finishes = plan.parts == 1 && !old,
                          .old = after.update.reads_running() ? old : nullptr,
                          .parts = plan.parts,
                          .chunk = plan.chunk,
                          .units = plan.units,
                          .width = plan.width};
  with_16_or_32_bits(element, [&](auto tag) {
    constexpr Element kElement = decltype(tag)::value;
    auto* kernel = plan.kind == Kind::kShortRuns ? &observe_short_runs<kElement>
                   : plan.kind == Kind::kColumns ? &observe_columns<kElement>
                   : plan.kind == Kind::kPacks   ? &observe_blocks<kElement, true>
                                                 : &observe_blocks<kElement, false>;
    COREAI_LAUNCH(kernel, plan.launched, kThreads, stream, job);
  });
  if (plan.parts > 1 && !old) {
    const int64_t launched = blocks_of_tiles((g.blocks + kThreads / kWarp - 1) / (kThreads / kWarp), most_blocks);
    COREAI_LAUNCH(merge_parts<>, launched, kThreads, stream, job);
  }
}

}  // namespace coreai::cuda
