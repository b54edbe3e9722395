// fake_quantize on a GPU.
//
// Memory is walked in packs of 16 bytes, which lie within a block if blocks are runs of elements, or hold neighbouring
// columns. A pack takes a few instructions an element, with the reciprocal of its scale; where that could differ from a
// division, for a scale, a bound or a quotient out of the ordinary, the pack is done again by divisions. So are the ends
// of tensors, and all of those that have other blocks, or do not start at 16 bytes: one element at a time.
//
// Nothing here knows torch; tests/kernels/emulation runs this file on the CPU.
#pragma once

#include "cuda/quantize/block_params.cuh"
#include "cuda/quantize/tiles.cuh"

namespace coreai::cuda {

// Stores the bits of kCount packs, as a thread has them: kSize of each, the first lowest. `mask`: the byte that the first
// pack's are in; those of the next are `step` bytes behind. A pack of four shares its byte with the neighbour's: the even
// thread writes those of the packs 0, 2, ..., the odd one the others. All threads of a warp have to come here.
template <Element kElement, int kCount>
__device__ __forceinline__ void store_bits(uint8_t* mask, int64_t step, uint32_t bits, const bool (&valid)[kCount]) {
  if constexpr (Pack<kElement>::kSize == 8) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (valid[i]) mask[i * step] = static_cast<uint8_t>(bits >> (8 * i));
    }
  } else {
    constexpr uint32_t kEven = 0x0f0f0f0fu;
    const uint32_t other = __shfl_xor_sync(0xffffffffu, bits, 1);
    const bool is_odd = (threadIdx.x & 1) != 0;
    const uint32_t bytes = is_odd ? (bits & ~kEven) | (other >> 4 & kEven) : (bits & kEven) | (other & kEven) << 4;
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const bool stores = is_odd ? i + 1 < kCount && valid[(i + 1) % kCount] : valid[i];
      if (stores) mask[(i + is_odd) * step] = static_cast<uint8_t>(bytes >> (4 * i));
    }
  }
}

// Sets bit `kBit` if `condition`: one instruction, where a selection and a sum would be two.
template <int kBit>
__device__ __forceinline__ void set_bit(uint32_t& bits, bool condition) {
#if defined(COREAI_EMULATED_THREADS)
  if (condition) bits |= 1u << kBit;
#else
  asm("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p or.b32 %0, %0, %2; }"
      : "+r"(bits)
      : "r"(static_cast<uint32_t>(condition)), "n"(1u << kBit));
#endif
}

template <class K, Element kElement, int kAt = 0, class Params>
__device__ __forceinline__ void quantize_values(float (&values)[Pack<kElement>::kSize], uint32_t& bits, Params params) {
  if constexpr (kAt < Pack<kElement>::kSize) {
    bool inside;
    values[kAt] = params(kAt).quantize(values[kAt], inside);
    set_bit<kAt>(bits, inside);
    quantize_values<K, kElement, kAt + 1>(values, bits, params);
  }
}

// Makes a pack its results, with the parameters params(i) for element i; returns their bits. Adds to `all` what is NaN if
// any of them is; or if they are very large, and then it costs no more than time.
template <class K, Element kElement, class Params>
__device__ __forceinline__ uint32_t quantize_pack(Pack<kElement>& pack, float& all, Params params) {
  constexpr int kSize = Pack<kElement>::kSize;
  float values[kSize];
  pack.unpack(values);
  uint32_t bits = 0;
  quantize_values<K, kElement>(values, bits, params);
#pragma unroll
  for (int i = 0; i < kSize; i += 2) all = Lane::fma(values[i], values[i + 1], all);
  Pack<kElement> result = Pack<kElement>::of(values);
  if constexpr (K::kFormat != Format::kInt) result.add_signs_of(pack);
  pack = result;
  return bits;
}

// Elements one at a time, with exact(i) for element i; returns their bits.
template <class K, Element kElement, class Exact>
__device__ __forceinline__ uint32_t quantize_exactly(const void* input, void* output, int64_t begin, int n, Exact exact) {
  using Word = WordOf<kElement>;
  const Word* x = static_cast<const Word*>(input) + begin;
  Word* y = static_cast<Word*>(output) + begin;
  uint32_t bits = 0;
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    bool inside;
    store_element<kElement>(y + i, exact(i).quantize_exactly(load_element<kElement>(x + i), inside));
    bits |= static_cast<uint32_t>(inside) << i;
  }
  return bits;
}

// The same of several packs, with params(j) for element j of each: store(i) stores pack i, unless one of them has to be done
// again, all of which again(i) then does. Returns their bits, of which again() returns those of a pack.
template <class K, Element kElement, int kCount, class Params, class Store, class Again>
__device__ __forceinline__ uint32_t quantize_packs(Pack<kElement> (&pack)[kCount], Params params, Store store, Again again) {
  constexpr int kSize = Pack<kElement>::kSize;
  uint32_t bits = 0;
  float all = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) bits |= quantize_pack<K, kElement>(pack[i], all, params) << (kSize * i);
  if (all == all) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) store(i);
  } else {
    bits = 0;
#pragma unroll 1
    for (int i = 0; i < kCount; ++i) bits |= again(i) << (kSize * i);
  }
  return bits;
}

struct RunsJob {
  const void* input;
  void* output;
  uint8_t* mask;  // null: not wanted
  AffineMap affine;
  int64_t numel;
  uint32_t packs;        // whole bytes of the mask
  uint32_t tiles;        // whole ones: of kUnroll packs for each thread
  Divider packs_of_run;  // of one block, where there is more than one
  bool shares;           // whether rows of `columns` runs share their blocks with `sharing` - 1 rows behind them
  uint32_t columns;
  Divider runs_of_row, sharing;
};

// Blocks that are runs of elements: a single one; whole numbers of kUnroll packs, of which neighbouring threads look up the
// parameters for each other; or whole numbers of packs.
enum class Runs { kOne, kLong, kShort };

// `block`: the parameters, if there is a single block.
template <class K, Element kElement, Runs kRuns>
__device__ __forceinline__ void quantize_runs(const RunsJob& job, BlockParams<K> block) {
  using P = Pack<kElement>;
  using Block = BlockParams<K>;
  constexpr uint32_t kTile = kThreads * kUnroll, kWarpTile = kWarp * kUnroll;
  const uint32_t thread = threadIdx.x, lane = thread % kWarp;
  const auto block_of = [&](uint32_t pack) {
    if constexpr (kRuns == Runs::kOne) return block;
    uint32_t index = job.packs_of_run.quotient(pack);
    if (job.shares) {
      const uint32_t row = job.runs_of_row.quotient(index);
      index -= (row - job.sharing.quotient(row)) * job.columns;
    }
    return Block::load(job.affine, index);
  };
  const auto exactly = [&](uint32_t pack) {
    const Block params = block_of(pack);
    return quantize_exactly<K, kElement>(job.input, job.output, int64_t{pack} * P::kSize, P::kSize,
                                         [&](int) { return params; });
  };
  for (uint32_t tile = blockIdx.x; tile < job.tiles; tile += gridDim.x) {
    const uint32_t own = tile * kTile + thread / kWarp * kWarpTile + lane;
    const uint4* x = static_cast<const uint4*>(job.input) + own;
    uint4* y = static_cast<uint4*>(job.output) + own;
    P pack[kUnroll];
    uint32_t bits = 0;
    float all = 0.0f;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) pack[i].raw = x[i * kWarp];
    // Of kUnroll neighbours, whose packs [i] are in one block, the i-th looks it up.
    if constexpr (kRuns == Runs::kLong) block = block_of(own + lane % kUnroll * kWarp);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      Block params = block;
      if constexpr (kRuns == Runs::kLong) params = block.of_lane(lane / kUnroll * kUnroll + i);
      if constexpr (kRuns == Runs::kShort) params = block_of(own + i * kWarp);
      bits |= quantize_pack<K, kElement>(pack[i], all, [&](int) { return params; }) << (P::kSize * i);
    }
    if (all == all) {
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) y[i * kWarp] = pack[i].raw;
    } else {
      bits = 0;
#pragma unroll 1
      for (int i = 0; i < kUnroll; ++i) bits |= exactly(own + i * kWarp) << (P::kSize * i);
    }
    if (job.mask) {
      constexpr bool valid[kUnroll] = {true, true, true, true};
      store_bits<kElement, kUnroll>(job.mask + own / (8 / P::kSize), kWarp * P::kSize / 8, bits, valid);
    }
  }
  if (blockIdx.x + 1 != gridDim.x) return;
  // What is left of less than a tile, and of less than a byte of the mask.
  for (uint32_t first = job.tiles * kTile; first < job.packs; first += kThreads) {
    const uint32_t own = first + thread;
    const bool valid[1] = {own < job.packs};
    uint32_t bits = 0;
    if (valid[0]) {
      P pack = {static_cast<const uint4*>(job.input)[own]};
      const Block params = block_of(own);
      float all = 0.0f;
      bits = quantize_pack<K, kElement>(pack, all, [&](int) { return params; });
      if (all == all) {
        static_cast<uint4*>(job.output)[own] = pack.raw;
      } else {
        bits = exactly(own);
      }
    }
    if (job.mask) store_bits<kElement, 1>(job.mask + own / (8 / P::kSize), 0, bits, valid);
  }
  const int64_t begin = int64_t{job.packs} * P::kSize;
  if (thread == 0 && begin < job.numel) {
    const Block params = block_of(job.packs);
    const uint32_t bits = quantize_exactly<K, kElement>(job.input, job.output, begin, static_cast<int>(job.numel - begin),
                                                        [&](int) { return params; });
    if (job.mask) job.mask[begin / 8] = static_cast<uint8_t>(bits);
  }
}

template <class K, Element kElement, Runs kRuns>
__global__ void __launch_bounds__(kThreads) fake_quantize_runs(RunsJob job) {
  BlockParams<K> block;
  if constexpr (kRuns == Runs::kOne) block = BlockParams<K>::load(job.affine, 0);
  quantize_runs<K, kElement, kRuns>(job, block);
}

// First block of a row of blocks.
__device__ __forceinline__ int64_t row_base(const cpu::Geometry& g, int64_t row) {
  int64_t base = 0;
  for (int axis = g.outer_axes - 1; axis >= 0; --axis) {
    base += row % g.outer[axis].size * g.outer[axis].stride;
    row /= g.outer[axis].size;
  }
  return base;
}

constexpr int kRows = 2;  // that a thread asks for before it waits

struct ColumnsJob {
  const void* input;
  void* output;
  uint8_t* mask;
  AffineMap affine;
  cpu::Geometry geometry;
  int64_t rows;     // all
  int64_t sharing;  // so many that follow each other have the same blocks
  int64_t tiles;    // of rows, in all
  int tile;         // rows of one, within those that share
};

// Each element of a row is a block of its own, and rows are whole bytes of the mask. A thread has a pack of columns, and
// walks down some rows with their parameters.
template <class K, Element kElement>
__global__ void __launch_bounds__(kThreads, 4) fake_quantize_columns(ColumnsJob job) {
  using P = Pack<kElement>;
  using Word = WordOf<kElement>;
  const int64_t columns = job.geometry.columns, packs = columns / P::kSize;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const bool exists = thread < packs * job.tiles;
  const int64_t column = thread % packs * P::kSize, tile = thread / packs;
  const int64_t tiles_sharing = (job.sharing + job.tile - 1) / job.tile;
  const int64_t inside = tile % tiles_sharing * job.tile, row = tile / tiles_sharing * job.sharing + inside;
  const int64_t rows = exists ? job.sharing - inside : 0;
  const int64_t base = exists ? row_base(job.geometry, row) + column : 0;
  BlockParams<K> params[P::kSize];
#pragma unroll
  for (int i = 0; i < P::kSize; ++i) params[i] = BlockParams<K>::load(job.affine, base + i);
  int64_t at = row * columns + column;
  for (int done = 0; done < job.tile; done += kRows, at += kRows * columns) {
    const Word* x = static_cast<const Word*>(job.input) + at;
    Word* y = static_cast<Word*>(job.output) + at;
    bool valid[kRows];
    P pack[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      valid[i] = done + i < rows;
      pack[i].raw = {};
      if (valid[i]) pack[i] = P::load(x + i * columns);
    }
    const uint32_t bits = quantize_packs<K, kElement>(
        pack, [&](int j) { return params[j]; },
        [&](int i) {
          if (valid[i]) pack[i].store(y + i * columns);
        },
        [&](int i) {
          if (done + i >= rows) return 0u;
          return quantize_exactly<K, kElement>(job.input, job.output, at + i * columns, P::kSize,
                                               [&](int j) { return BlockParams<K>::load(job.affine, base + j); });
        });
    if (job.mask) store_bits<kElement, kRows>(job.mask + at / 8, columns / 8, bits, valid);
  }
}

struct AnyJob {
  const void* input;
  void* output;
  uint8_t* mask;
  AffineMap affine;
  cpu::Geometry geometry;
};

// Any blocks: a thread has the elements of a byte of the mask, and looks for the block of each.
template <class K, Element kElement>
__global__ void __launch_bounds__(kThreads) fake_quantize_any(AnyJob job) {
  const cpu::Geometry& g = job.geometry;
  const int64_t begin = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * 8;
  if (begin >= g.numel) return;
  const int64_t length = g.run * g.columns;
  int64_t row = begin / length, base = row_base(g, row);
  int64_t column = begin % length / g.run, place = begin % g.run;
  const int n = static_cast<int>(g.numel - begin < 8 ? g.numel - begin : 8);
  const uint32_t bits = quantize_exactly<K, kElement>(job.input, job.output, begin, n, [&](int) {
    const auto params = BlockParams<K>::load(job.affine, base + column);
    if (++place == g.run) place = 0, ++column;
    if (column == g.columns) column = 0, base = row_base(g, ++row);
    return params;
  });
  if (job.mask) job.mask[begin / 8] = static_cast<uint8_t>(bits);
}

// Host side.

template <class Body>
void with_kind(Format format, bool has_offset, Body body) {
  switch (format) {
#define COREAI_CASE(name) \
  case Format::name:      \
    return body(Kind<Format::name>{});
    COREAI_FOR_EACH_FLOAT_FORMAT(COREAI_CASE)
#undef COREAI_CASE
    default:
      return has_offset ? body(Kind<Format::kInt, true>{}) : body(Kind<Format::kInt>{});
  }
}

// Rows that follow each other and have the same blocks.
inline int64_t sharing_rows(const cpu::Geometry& g) {
  if (g.outer_axes == 0) return 1;
  const auto& inner = g.outer[g.outer_axes - 1];
  return inner.stride == 0 ? inner.size : 1;
}

// Threads that keep a GPU busy; and as few rows as pay for a thread's parameters of a pack of columns.
constexpr int64_t kManyThreads = 1 << 17;
constexpr int kFewRows = 8, kManyRows = 64;

template <class K, Element kElement, class Stream>
void queue_columns(const cpu::FakeQuantize& job, Stream stream) {
  const cpu::Geometry& g = *job.geometry;
  const int64_t rows = g.numel / g.columns, packs = g.columns / Pack<kElement>::kSize, sharing = sharing_rows(g);
  int tile = kFewRows;
  while (tile < kManyRows && packs * rows / (2 * tile) >= kManyThreads) tile *= 2;
  const int64_t tiles = rows / sharing * ((sharing + tile - 1) / tile);
  auto* kernel = &fake_quantize_columns<K, kElement>;
  COREAI_LAUNCH(kernel, blocks_for(packs * tiles), kThreads, stream,
                ColumnsJob{job.input, job.output, job.mask, AffineMap(job.affine), g, rows, sharing, tiles, tile});
}

// Of more elements than these, positions of packs need more than 31 bits.
constexpr int64_t kMostInRuns = int64_t{1} << 32;

// Of one block; queue_runs() says how others are found.
template <Element kElement>
RunsJob runs_job(const cpu::FakeQuantize& job) {
  constexpr int kSize = Pack<kElement>::kSize;
  const cpu::Geometry& g = *job.geometry;
  const auto packs = static_cast<uint32_t>(g.numel / 8 * (8 / kSize));
  return {.input = job.input,
          .output = job.output,
          .mask = job.mask,
          .affine = AffineMap(job.affine),
          .numel = g.numel,
          .packs = packs,
          .tiles = packs / (kThreads * kUnroll),
          .packs_of_run = {},
          .shares = g.outer_axes > 0,
          .columns = 0,
          .runs_of_row = {},
          .sharing = {}};
}

template <class K, Element kElement, class Stream>
void queue_runs(const cpu::FakeQuantize& job, int64_t most_blocks, Stream stream) {
  constexpr int kSize = Pack<kElement>::kSize;
  const cpu::Geometry& g = *job.geometry;
  RunsJob runs = runs_job<kElement>(job);
  const int64_t blocks = blocks_of_tiles(runs.tiles, most_blocks);
  if (g.blocks > 1) {
    runs.packs_of_run = Divider::by(static_cast<uint32_t>(g.run / kSize));
    runs.columns = static_cast<uint32_t>(g.columns);
    runs.runs_of_row = Divider::by(runs.columns);
    runs.sharing = Divider::by(static_cast<uint32_t>(sharing_rows(g)));
  }
  const auto launch = [&](auto* kernel) { COREAI_LAUNCH(kernel, blocks, kThreads, stream, runs); };
  if (g.blocks == 1) {
    launch(&fake_quantize_runs<K, kElement, Runs::kOne>);
  } else if (g.run % (kUnroll * kSize) == 0) {
    launch(&fake_quantize_runs<K, kElement, Runs::kLong>);
  } else {
    launch(&fake_quantize_runs<K, kElement, Runs::kShort>);
  }
}

// Whether blocks are runs of whole packs, one behind the other, or in groups of rows that share theirs.
inline bool is_by_runs(const cpu::Geometry& g) {
  if (g.blocks == 1) return true;
  const bool one_level = g.outer_axes == 0 || g.outer[g.outer_axes - 1].stride == 0;
  const bool in_order = g.outer_axes < 2 || (g.outer_axes == 2 && g.outer[0].stride == g.columns);
  return g.run % 8 == 0 && one_level && in_order;
}

// Queues the kernel for a tensor that is not empty. `most_blocks`: how many run at the same time.
template <class Stream>
void queue_fake_quantize(const cpu::FakeQuantize& job, int64_t most_blocks, Stream stream) {
  const cpu::Geometry& g = *job.geometry;
  with_16_or_32_bits(job.element, [&](auto element) {
    constexpr Element kElement = decltype(element)::value;
    with_kind(job.affine.format, job.affine.offset != nullptr, [&](auto kind) {
      using K = decltype(kind);
      const bool vectors = is_aligned(job.input) && is_aligned(job.output);
      if (vectors && g.numel <= kMostInRuns && is_by_runs(g)) {
        queue_runs<K, kElement>(job, most_blocks, stream);
      } else if (vectors && g.run == 1 && g.columns % 8 == 0) {
        queue_columns<K, kElement>(job, stream);
      } else {
        auto* kernel = &fake_quantize_any<K, kElement>;
        COREAI_LAUNCH(kernel, blocks_for((g.numel + 7) / 8), kThreads, stream,
                      AnyJob{job.input, job.output, job.mask, AffineMap(job.affine), g});
      }
    });
  });
}

}  // namespace coreai::cuda
