// Minimum and maximum of each block. NaN wins over numbers.
#pragma once

#include "cpu/qparams.h"
#include "cpu/simd_words.h"

namespace coreai::cpu::COREAI_LEVEL {
namespace {

// Lanes of a running minimum and maximum that skip NaN, and where NaN was seen.
struct Extremes {
  F low = Simd::set(__builtin_inff());
  F high = Simd::set(-__builtin_inff());
  M nan = Simd::none();

  COREAI_HD void take(F x) {
    low = Simd::min(x, low);
    high = Simd::max(x, high);
    nan = Simd::mor(nan, Simd::unordered(x, x));
  }
  COREAI_HD void take(F x, F y) {
    low = Simd::min(x, Simd::min(y, low));
    high = Simd::max(x, Simd::max(y, high));
    nan = Simd::mor(nan, Simd::unordered(x, y));
  }
  COREAI_HD void take(const Extremes& other) {
    low = Simd::min(other.low, low);
    high = Simd::max(other.high, high);
    nan = Simd::mor(nan, other.nan);
  }
};

template <class T>
COREAI_HD Extremes extremes_of(const T* x, int64_t n) {
  Extremes a;
  if (n < kWidth) {
    const F lanes = Simd::load_n(x, static_cast<int>(n));
    const M present = Simd::first(static_cast<int>(n));
    a.low = Simd::select(present, Simd::min(lanes, a.low), a.low);
    a.high = Simd::select(present, Simd::max(lanes, a.high), a.high);
    a.nan = Simd::mand(present, Simd::unordered(lanes, lanes));
    return a;
  }
  int64_t i = 0;
  if (n >= 8 * kWidth) {
    Extremes b;
    for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
      a.take(Simd::load(x + i), Simd::load(x + i + kWidth));
      b.take(Simd::load(x + i + 2 * kWidth), Simd::load(x + i + 3 * kWidth));
    }
    a.take(b);
  }
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) a.take(Simd::load(x + i), Simd::load(x + i + kWidth));
  for (; i + kWidth <= n; i += kWidth) a.take(Simd::load(x + i));
  if (i < n) a.take(Simd::load(x + n - kWidth));  // overlaps what was taken: harmless
  return a;
}

// `range`, but NaN for the blocks that have one: rare enough to look at the elements again.
template <class T>
__attribute__((noinline)) Range with_nan(const T* x, int64_t run, int blocks, Range range) {
  uint32_t nan = 0;
  for (int i = 0; i < blocks; ++i) nan |= static_cast<uint32_t>(Simd::any(extremes_of(x + i * run, run).nan)) << i;
  const M is_nan = Simd::from_bits(nan);
  const F quiet = Simd::set(__builtin_nanf(""));
  return {Simd::select(is_nan, quiet, range.low), Simd::select(is_nan, quiet, range.high)};
}

// 16-bit elements are compared as signed words: with the other bits of negative ones flipped these have the order of
// the values, and NaN of either sign lies beyond the infinities. Twice the lanes, and nothing to widen.
template <class T>
struct OrderedWords {
  using W = Words<2>;
  using V = W::V;
  static constexpr int16_t kInfinity = kIsBFloat16<T> ? 0x7f80 : 0x7c00;

  V low = W::set(INT16_MAX), high = W::set(INT16_MIN);

  // Elements to keys, and back.
  static COREAI_HD V flip(V words) { return words ^ ((words >> 15) & W::set(0x7fff)); }
  COREAI_HD void take(const T* x) {
    const V keys = flip(W::load(x));
    low = W::min(low, keys);
    high = W::max(high, keys);
  }
  COREAI_HD void take(const OrderedWords& other) {
    low = W::min(low, other.low);
    high = W::max(high, other.high);
  }
  // Extremes of n >= W::kLanes elements.
  static COREAI_HD OrderedWords of(const T* x, int64_t n) {
    OrderedWords a;
    int64_t i = 0;
    if (n >= 4 * W::kLanes) {
      OrderedWords b;
      for (; i + 2 * W::kLanes <= n; i += 2 * W::kLanes) {
        a.take(x + i);
        b.take(x + i + W::kLanes);
      }
      a.take(b);
    }
    for (; i + W::kLanes <= n; i += W::kLanes) a.take(x + i);
    if (i < n) a.take(x + n - W::kLanes);  // overlaps what was taken: harmless
    return a;
  }
  // Lanes of two keys each to the value of the one that `choose` prefers.
  template <class Choose>
  static COREAI_HD F value_of(F pairs, Choose choose, V& keys) {
    const I lanes = Simd::as_int(pairs);
    const I swapped = Simd::ior(Simd::template shl<16>(lanes), Simd::template shr<16>(lanes));
    keys = choose((V)lanes, (V)swapped);
    const I words = (I)flip(keys);
    if constexpr (kIsBFloat16<T>) {
      return Simd::as_float(Simd::template shl<16>(words));
    } else {
      alignas(64) int32_t wide[kWidth];
      alignas(64) uint16_t narrow[kWidth];
      Simd::store(wide, words);
      for (int i = 0; i < kWidth; ++i) narrow[i] = static_cast<uint16_t>(wide[i]);
      return Simd::load(reinterpret_cast<const T*>(narrow));
    }
  }
};

// See `range_of_blocks`; here run >= Words<2>::kLanes, of a 16-bit type.
template <class T, class Lanes = Simd>
COREAI_HD Range range_of_word_blocks(const T* x, int64_t run, int blocks) {
  using Keys = OrderedWords<T>;
  using W = typename Keys::W;
  F low[kWidth], high[kWidth];
  for (int i = 0; i < blocks; ++i) {
    const Keys e = Keys::of(x + i * run, run);
    low[i] = (F)e.low, high[i] = (F)e.high;
  }
  for (int i = blocks; i < kWidth; ++i) low[i] = high[i] = Simd::set(0.0f);
  typename W::V low_keys, high_keys;
  const Range range = {Keys::value_of(Lanes::min_of_word_rows(low), W::min, low_keys),
                       Keys::value_of(Lanes::max_of_word_rows(high), W::max, high_keys)};
  const uint64_t nan = W::bits(W::greater(high_keys, W::set(Keys::kInfinity))) |
                       W::bits(W::greater(W::set(static_cast<int16_t>(~Keys::kInfinity)), low_keys));
  return __builtin_expect(nan != 0, false) ? with_nan(x, run, blocks, range) : range;
}

// Lane i: the range of block i, of `blocks` <= kWidth blocks of `run` neighbouring elements.
template <class T>
COREAI_HD Range range_of_blocks(const T* x, int64_t run, int blocks) {
  if constexpr (Simd::kHasWordRows && sizeof(T) == 2) {
    if (run >= Words<2>::kLanes) return range_of_word_blocks(x, run, blocks);
  }
  F low[kWidth], high[kWidth];
  M nan = Simd::none();
  for (int i = 0; i < blocks; ++i) {
    const Extremes e = extremes_of(x + i * run, run);
    low[i] = e.low, high[i] = e.high;
    nan = Simd::mor(nan, e.nan);
  }
  for (int i = blocks; i < kWidth; ++i) low[i] = high[i] = Simd::set(0.0f);
  const Range range = {Simd::min_of_rows(low), Simd::max_of_rows(high)};
  return __builtin_expect(Simd::any(nan), false) ? with_nan(x, run, blocks, range) : range;
}

template <class = void>
COREAI_HD void merge_block(float low, float high, float* block_low, float* block_high) {
  // Written so that a NaN on either side stays.
  *block_low = low != low || low < *block_low ? low : *block_low;
  *block_high = high != high || high > *block_high ? high : *block_high;
}

template <class T>
COREAI_HD void merge_run(const T* x, int64_t n, float* block_low, float* block_high) {
  const Range range = range_of_blocks(x, n, 1);
  alignas(64) float low[kWidth], high[kWidth];
  Simd::store(low, range.low);
  Simd::store(high, range.high);
  merge_block(low[0], high[0], block_low, block_high);
}

template <class T>
COREAI_HD void merge_columns(const T* x, int64_t stride, int rows, int64_t n, float* low, float* high) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int some = static_cast<int>(smaller<int64_t>(kWidth, n - i));
    Extremes e;
    for (int row = 0; row < rows; ++row) {
      const T* p = x + row * stride + i;
      e.take(some == kWidth ? Simd::load(p) : Simd::load_n(p, some));
    }
    const F quiet = Simd::set(__builtin_nanf(""));
    const F old_low = Simd::load_n(low + i, some), old_high = Simd::load_n(high + i, some);
    Simd::store_n(low + i, Simd::select(e.nan, quiet, nan_min(old_low, e.low)), some);
    Simd::store_n(high + i, Simd::select(e.nan, quiet, nan_max(old_high, e.high)), some);
  }
}

template <class = void>
COREAI_HD void fill(float* low, float* high, int64_t n) {
  for (int64_t i = 0; i < n; ++i) low[i] = __builtin_inff(), high[i] = -__builtin_inff();
}

// Rows [begin, end) of the tensor, merged into the blocks' extremes.
template <class T>
void merge_rows(const Geometry& g, const T* x, int64_t begin, int64_t end, float* low, float* high) {
  const int64_t length = row_length(g);
  const int64_t band = g.outer_axes > 0 && g.outer[g.outer_axes - 1].stride == 0 ? g.outer[g.outer_axes - 1].size : 1;
  // Short runs in many rows: accumulate element by element, fold the runs at the end.
  const bool by_columns = g.run == 1 || (g.run < 4 * kWidth && band >= 4);
  float* scratch = by_columns && g.run > 1 ? new float[static_cast<uint64_t>(2 * length)] : nullptr;
  while (begin < end) {
    const int64_t stop = smaller(end, begin - begin % band + band);
    const int64_t base = row_base(g, begin);
    if (by_columns) {
      float* column_low = scratch ? scratch : low + base;
      float* column_high = scratch ? scratch + length : high + base;
      if (scratch) fill(column_low, column_high, length);
      for (; begin + 4 <= stop; begin += 4) merge_columns(x + begin * length, length, 4, length, column_low, column_high);
      for (; begin < stop; ++begin) merge_columns(x + begin * length, length, 1, length, column_low, column_high);
      for (int64_t i = 0; scratch && i < length; ++i) {
        merge_block(column_low[i], column_high[i], low + base + i / g.run, high + base + i / g.run);
      }
    } else {
      for (; begin < stop; ++begin) {
        for (int64_t i = 0; i < g.columns; ++i) {
          merge_run(x + begin * length + i * g.run, g.run, low + base + i, high + base + i);
        }
      }
    }
  }
  delete[] scratch;
}

// One extent of a single row per thread, merged at the end: extremes do not depend on the order.
template <class T>
void observe_shared(const Geometry& g, const T* x, float* low, float* high) {
  const bool one_block = g.blocks == 1;
  const int64_t count = one_block ? g.numel : (g.numel / row_length(g));
  const int64_t parts = g.numel < kParallelElements ? 1 : smaller(threads(), count);
  const int64_t part = (count + parts - 1) / parts;
  float* extremes = new float[static_cast<uint64_t>(2 * parts * g.blocks)];
  share(parts, 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* part_low = extremes + 2 * i * g.blocks;
      float* part_high = part_low + g.blocks;
      fill(part_low, part_high, g.blocks);
      const int64_t first = smaller(count, i * part), last = smaller(count, first + part);
      if (first == last) continue;
      if (one_block) {
        merge_run(x + first, last - first, part_low, part_high);
      } else {
        merge_rows(g, x, first, last, part_low, part_high);
      }
    }
  });
  fill(low, high, g.blocks);
  for (int64_t i = 0; i < parts; ++i) {
    const float* part_low = extremes + 2 * i * g.blocks;
    for (int64_t j = 0; j < g.blocks; ++j) merge_block(part_low[j], part_low[g.blocks + j], low + j, high + j);
  }
  for (int64_t j = 0; j < g.blocks; ++j) low[j] += 0.0f, high[j] += 0.0f;
  delete[] extremes;
}

// Blocks that lie one after the other in memory.
inline bool is_row_wise(const Geometry& g) { return g.outer_axes == 0 && g.columns > 1; }

template <class T>
void observe_rows(const Geometry& g, const T* x, float* low, float* high) {
  const int64_t grain = larger<int64_t>(1, kParallelElements / g.run);
  share(g.columns, kWidth, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kWidth) {
      const int n = static_cast<int>(smaller<int64_t>(kWidth, end - i));
      const Range range = range_of_blocks(x + i * g.run, g.run, n);
      Simd::store_n(low + i, Simd::add(range.low, Simd::set(0.0f)), n);
      Simd::store_n(high + i, Simd::add(range.high, Simd::set(0.0f)), n);
    }
  });
}

void observe_range(const RangeRequest& job) {
  with_type(job.element, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* x = static_cast<const T*>(job.input);
    if (is_row_wise(*job.geometry)) {
      observe_rows(*job.geometry, x, job.low, job.high);
    } else {
      observe_shared(*job.geometry, x, job.low, job.high);
    }
  });
}

}  // namespace
}  // namespace coreai::cpu::COREAI_LEVEL
