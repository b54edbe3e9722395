// Minimum and maximum of each block. NaN wins over numbers.
#pragma once

#include "cpu/quantize/block_ranges.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

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

template <class = void>
COREAI_HD void merge_lanes(F low, F high, float* into_low, float* into_high, int n) {
  Simd::store_n(into_low, nan_min<Simd>(Simd::load_n(into_low, n), low), n);
  Simd::store_n(into_high, nan_max<Simd>(Simd::load_n(into_high, n), high), n);
}

// n <= kWidth columns of some rows, `stride` elements apart.
template <bool kWhole, class T>
COREAI_HD void merge_lanes_of_rows(const T* x, int64_t stride, int rows, int n, float* low, float* high) {
  Extremes e;
  for (int row = 0; row < rows; ++row, x += stride) e.take(kWhole ? Simd::load(x) : Simd::load_n(x, n));
  const F quiet = Simd::set(__builtin_nanf(""));
  merge_lanes(Simd::select(e.nan(), quiet, e.low), Simd::select(e.nan(), quiet, e.high), low, high, n);
}

// Columns [i, n) of some rows.
template <class T>
COREAI_HD void merge_columns(const T* x, int64_t stride, int rows, int64_t i, int64_t n, float* low, float* high) {
  for (; i + kWidth <= n; i += kWidth) merge_lanes_of_rows<true>(x + i, stride, rows, kWidth, low + i, high + i);
  if (i < n) merge_lanes_of_rows<false>(x + i, stride, rows, static_cast<int>(n - i), low + i, high + i);
}

// The same of 16-bit elements by words, as far as there are whole vectors. Returns how many columns that is.
template <class T>
COREAI_HD int64_t merge_word_columns(const T* x, int64_t stride, int rows, int64_t n, float* low, float* high) {
  using W = Words<2>;
  int64_t i = 0;
  for (; i + W::kLanes <= n; i += W::kLanes) {
    WordExtremes<T, false> e;
    for (int row = 0; row < rows; ++row) e.take(x + row * stride + i);
    if (__builtin_expect(e.has_nan(), false)) {
      merge_columns(x, stride, rows, i, i + W::kLanes, low, high);
      continue;
    }
    alignas(64) T lows[W::kLanes], highs[W::kLanes];
    W::store(lows, e.keys(e.low));
    W::store(highs, e.keys(e.high));
    for (int j = 0; j < W::kLanes; j += kWidth) {
      merge_lanes(Simd::load(lows + j), Simd::load(highs + j), low + i + j, high + i + j, kWidth);
    }
  }
  return i;
}

// Rows whose columns are merged at once: what is accumulated is read and written once for so many.
constexpr int kMergedRows = 16;

template <class T>
COREAI_HD void merge_column_rows(const T* x, int64_t stride, int rows, int64_t n, float* low, float* high) {
  int64_t done = 0;
  if constexpr (sizeof(T) == 2) done = merge_word_columns(x, stride, rows, n, low, high);
  merge_columns(x, stride, rows, done, n, low, high);
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
    const int64_t stop = min(end, begin - begin % band + band);
    const int64_t base = row_base(g, begin);
    if (by_columns) {
      float* column_low = scratch ? scratch : low + base;
      float* column_high = scratch ? scratch + length : high + base;
      if (scratch) fill(column_low, column_high, length);
      for (int rows; begin < stop; begin += rows) {
        rows = static_cast<int>(min<int64_t>(kMergedRows, stop - begin));
        merge_column_rows(x + begin * length, length, rows, length, column_low, column_high);
      }
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
  const int64_t parts = g.numel < kParallelElements ? 1 : min(threads(), count);
  const int64_t part = (count + parts - 1) / parts;
  float* extremes = new float[static_cast<uint64_t>(2 * parts * g.blocks)];
  parallel_for(parts, 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* part_low = extremes + 2 * i * g.blocks;
      float* part_high = part_low + g.blocks;
      fill(part_low, part_high, g.blocks);
      const int64_t first = min(count, i * part), last = min(count, first + part);
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
  const int64_t grain = max<int64_t>(1, kParallelElements / g.run);
  parallel_for(g.columns, kWidth, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kWidth) {
      const int n = static_cast<int>(min<int64_t>(kWidth, end - i));
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
}  // namespace coreai::cpu::COREAI_ISA
