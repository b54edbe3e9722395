// The kernel that does a step of blocks that are single columns and keeps them in between: see held_steps.cuh.
//
// A block of threads has some packs of columns and as many of their rows as it can keep. Where those are not all rows,
// several blocks have a part of them each, tell the others what they found in it, and wait.
#pragma once

#include "cuda/quantize/held_tensor.cuh"

namespace coreai::cuda {

constexpr int kSharedRows = 8;  // packs of a thread in shared memory
// Packs that a thread takes at once; the last it keeps in registers, which parameters of eight columns leave few of.
template <Element kElement>
constexpr int kHeldRows = kElement == Element::kFloat32 ? 4 : 2;
// Packs across: no fewer than are read well, and so few that each of their columns has a thread.
constexpr int kFewAcross = 8, kManyAcross = kThreads / 8 < 16 ? kThreads / 8 : 16;

struct HeldColumnsJob {
  const void* input;
  void* output;
  uint8_t* mask;
  AffineMap affine;
  AfterRange after;
  Partials partials;  // [parts, blocks], if there are several parts
  uint32_t blocks, columns;
  uint32_t packs;  // of a row
  uint32_t units;  // rows that follow each other and have the same blocks
  int chunk;       // so many of them a part
  uint32_t parts, tiles;
  Divider by_parts, by_tiles;
  int shift;  // a tile is 1 << shift packs across
};

// What quantizing a column takes.
struct alignas(16) ColumnParams {
  float scale, reciprocal, low, high;  // of ranges with an offset, `low` is that

  template <class K>
  static __device__ __forceinline__ ColumnParams of(const BlockParams<K>& p) {
    return {p.scale, p.reciprocal, K::kHasOffset ? p.offset : p.low, p.high};
  }
  template <class K>
  __device__ __forceinline__ BlockParams<K> params(const AffineMap& a) const {
    BlockParams<K> p;
    p.scale = scale, p.reciprocal = reciprocal;
    p.low = a.low, p.high = a.high, p.offset = 0.0f;
    if constexpr (K::kHasOffset) {
      p.low -= a.constant, p.high -= a.constant;
      p.offset = low;
    } else if constexpr (K::kFormat == Format::kInt) {
      p.low = low, p.high = high;
    }
    return p;
  }
};

// Ranges of columns, a pack of them an element of these.
template <Element kElement>
struct ColumnRanges {
  uint4 low[kThreads / 2], high[kThreads / 2];

  // Of what threads have found whose numbers have the same rest by `width`, a power of two. All come here.
  __device__ __forceinline__ void merge(ColumnExtremes<kElement> found, int width) {
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (int left = kThreads / 2; left >= width; left /= 2) {
      if (thread >= left && thread < 2 * left) low[thread - left] = found.lowest(), high[thread - left] = found.highest();
      __syncthreads();
      if (thread < left) found.take(low[thread], high[thread]);
      __syncthreads();
    }
    if (thread < width) low[thread] = found.lowest(), high[thread] = found.highest();
    __syncthreads();
  }
  __device__ __forceinline__ Range of(uint32_t column) const {
    const auto element = [&](const uint4* from) {
      const auto* words = reinterpret_cast<const uint32_t*>(from);
      if constexpr (kElement == Element::kFloat32) return Lane::as_float(static_cast<int32_t>(words[column]));
      return widen<kElement>(words[column / 2] >> column % 2 * 16 & 0xffffu);
    };
    return {element(low), element(high)};
  }
};

template <class K, Element kElement>
__device__ __forceinline__ void step_held_columns(const HeldColumnsJob& job) {
  using P = Pack<kElement>;
  constexpr int kCount = kHeldRows<kElement>;
  __shared__ uint4 held[kSharedRows * kThreads];
  __shared__ ColumnRanges<kElement> ranges;
  __shared__ ColumnParams of_columns[P::kSize * kManyAcross];  // neighbours are those of neighbouring packs
  const uint32_t thread = threadIdx.x, across = thread & ((1u << job.shift) - 1);
  const int row = static_cast<int>(thread >> job.shift), rows = kThreads >> job.shift;
  const uint32_t rest = job.by_tiles.quotient(blockIdx.x), tile = blockIdx.x - rest * job.tiles;
  const uint32_t group = job.by_parts.quotient(rest), part = rest - group * job.parts;
  const uint32_t begin = part * static_cast<uint32_t>(job.chunk), own = (tile << job.shift) + across;
  const int to_the_last = static_cast<int>(job.units - begin), here = job.chunk < to_the_last ? job.chunk : to_the_last;
  // Who has no such pack or row looks at the last one, too: it is in the range anyway.
  const bool exists = own < job.packs;
  const uint32_t first = (group * job.units + begin) * job.packs + (exists ? own : job.packs - 1);
  uint4* slot = held + thread;
  P pack[kCount];
  auto found = ColumnExtremes<kElement>::with_zero();
  int done = row;
  for (;;) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int at = done + i * rows < here ? done + i * rows : here - 1;
      pack[i].raw = static_cast<const uint4*>(job.input)[first + static_cast<uint32_t>(at) * job.packs];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) found.take(pack[i].raw, pack[i].raw);
    if (done - row + kCount * rows >= here) break;
#pragma unroll
    for (int i = 0; i < kCount; ++i) slot[i * kThreads] = pack[i].raw;
    slot += kCount * kThreads;
    done += kCount * rows;
  }

  const uint32_t column = (tile << job.shift) * P::kSize + thread;
  const bool chooses = thread < static_cast<uint32_t>(P::kSize << job.shift) && column < job.columns;
  const uint32_t block = group * job.columns + column;
  ranges.merge(found, 1 << job.shift);
  Range range = {}, old = {};
  if (chooses) {
    range = ranges.of(thread);
    if (job.after.update.reads_running()) old = running_range(job.after, kElement, block);
    if (job.parts > 1) {
      job.partials.low[part * job.blocks + block] = range.low;
      job.partials.high[part * job.blocks + block] = range.high;
    }
  }
  if (job.parts > 1) {
    sync_grid();
    if (chooses) {
#pragma unroll 1
      for (uint32_t other = 0; other < job.parts; ++other) {
        merge(range, {job.partials.low[other * job.blocks + block], job.partials.high[other * job.blocks + block]});
      }
    }
  }
  if (chooses) {
    range = update_lanes<Lane>(job.after.update, kElement, range, old);
    const auto chosen = choose<K, kElement>(job.after, range);
    if (part == 0) {
      store_running(job.after, kElement, range, block);
      store_qparams(chosen, job.after.out, block);
    }
    of_columns[thread % P::kSize * kManyAcross + thread / P::kSize] = ColumnParams::of(params_of<K>(job.affine, chosen));
  }
  __syncthreads();
  const auto exact_params = [&](int j) { return of_columns[j * kManyAcross + across].template params<K>(job.affine); };
  BlockParams<K> params[P::kSize];
#pragma unroll
  for (int j = 0; j < P::kSize; ++j) params[j] = exact_params(j);

  for (;;) {
    const auto place = [&](int i) { return first + static_cast<uint32_t>(done + i * rows) * job.packs; };
    const auto valid = [&](int i) { return exists && done + i * rows < here; };
    const uint32_t bits = quantize_packs<K, kElement>(
        pack, [&](int j) { return params[j]; },
        [&](int i) {
          if (valid(i)) static_cast<uint4*>(job.output)[place(i)] = pack[i].raw;
        },
        [&](int i) {
          if (!valid(i)) return 0u;
          return quantize_exactly<K, kElement>(job.input, job.output, int64_t{place(i)} * P::kSize, P::kSize, exact_params);
        });
    if (job.mask) {
      bool exist[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) exist[i] = valid(i);
      store_bits<kElement, kCount>(job.mask + place(0) / (8 / P::kSize), (place(1) - place(0)) / (8 / P::kSize), bits,
                                   exist);
    }
    if (done == row) break;
    slot -= kCount * kThreads;
    done -= kCount * rows;
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack[i].raw = slot[i * kThreads];
  }
}

template <class K, Element kElement>
__global__ void __launch_bounds__(kThreads, kHeldBlocks) step_of_held_columns(HeldColumnsJob job) {
  step_held_columns<K, kElement>(job);
}

// Host side.

struct HeldColumnsPlan {
  int shift;
  int64_t tiles, parts, chunk, groups;
};

template <Element kElement>
HeldColumnsPlan plan_held_columns(const cpu::Geometry& g) {
  const int64_t packs = g.columns / Pack<kElement>::kSize, units = g.outer[g.outer_axes - 1].size;
  const auto most_rows = [](int across) { return (kSharedRows + kHeldRows<kElement>)*(kThreads / across); };
  int across = kManyAcross;
  while (across > 1 && across / 2 >= packs) across /= 2;
  while (across > kFewAcross && most_rows(across) < units) across /= 2;
  HeldColumnsPlan plan = {.shift = 0, .tiles = (packs + across - 1) / across, .parts = 1, .chunk = 0, .groups = 0};
  while (1 << plan.shift < across) ++plan.shift;
  plan.parts = (units + most_rows(across) - 1) / most_rows(across);
  plan.chunk = (units + plan.parts - 1) / plan.parts;
  plan.groups = g.blocks / g.columns;
  return plan;
}

template <Element kElement>
HeldColumnsJob held_columns_job(const cpu::FakeQuantize& job, const AfterRange& after, float* workspace) {
  const cpu::Geometry& g = *job.geometry;
  const auto plan = plan_held_columns<kElement>(g);
  const auto parts = static_cast<uint32_t>(plan.parts), tiles = static_cast<uint32_t>(plan.tiles);
  return {.input = job.input,
          .output = job.output,
          .mask = job.mask,
          .affine = AffineMap(job.affine),
          .after = after,
          .partials = {workspace, workspace + plan.parts * g.blocks},
          .blocks = static_cast<uint32_t>(g.blocks),
          .columns = static_cast<uint32_t>(g.columns),
          .packs = static_cast<uint32_t>(g.columns / Pack<kElement>::kSize),
          .units = static_cast<uint32_t>(g.outer[g.outer_axes - 1].size),
          .chunk = static_cast<int>(plan.chunk),
          .parts = parts,
          .tiles = tiles,
          .by_parts = Divider::by(parts),
          .by_tiles = Divider::by(tiles),
          .shift = plan.shift};
}

}  // namespace coreai::cuda
