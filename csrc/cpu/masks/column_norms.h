// L1 norms of columns, and of blocks that are some columns side by side.
#pragma once

#include "cpu/loops.h"
#include "cpu/masks/unit_sums.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

constexpr int64_t kStrip = 1024;    // columns whose sums stay in the nearest cache
constexpr int64_t kFirstRows = 64;  // that a guess is made from, at least

// Sums of neighbouring columns.
struct Strip {
  int64_t width, run;
  alignas(64) int32_t peaks[kStrip];
  alignas(64) float scales[kStrip];
  alignas(64) uint64_t units[kStrip];

  Strip(int64_t columns, int64_t run_) : width(columns), run(run_) { __builtin_memset(peaks, 0, sizeof(peaks)); }

  // body.operator()<run>() for the runs that loops over blocks are compiled for, <0> for others.
  template <class Body>
  static COREAI_HD void with_run(int64_t run, Body body) {
    switch (run) {
      case 1:
        return body.template operator()<1>();
      case 2:
        return body.template operator()<2>();
      case 4:
        return body.template operator()<4>();
      case 8:
        return body.template operator()<8>();
      case 16:
        return body.template operator()<16>();
      case 32:
        return body.template operator()<32>();
      default:
        return body.template operator()<0>();
    }
  }

  // Gives all columns of a block the largest of their peaks. Not inlined, as `values`: one copy for all types.
  __attribute__((noinline)) void join_peaks() {
    with_run(run, [this]<int kRun>() {
      const int64_t length = kRun > 0 ? kRun : run;
      for (int64_t i = 0; i < width; i += length) {
        int32_t peak = 0;
        for (int64_t j = 0; j < length; ++j) peak = max(peak, peaks[i + j]);
        for (int64_t j = 0; j < length; ++j) peaks[i + j] = peak;
      }
    });
  }
  void start(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) scales[i] = scale_for(peaks[i]), units[i] = 0;
  }
  // Whether columns [begin, end) have been added up with other scales than theirs.
  bool is_wrong(int64_t begin, int64_t end) const {
    int different = 0;
    for (int64_t i = begin; i < end; ++i) different |= bits_of(scales[i]) ^ bits_of(scale_for(peaks[i]));
    return different != 0;
  }
  bool has_tiny() const {
    int tiny = 0;
    for (int64_t i = 0; i < width; ++i) tiny |= is_tiny(peaks[i]);
    return tiny != 0;
  }
  __attribute__((noinline)) void values(double* norms) const {
    with_run(run, [&]<int kRun>() {
      const int64_t length = kRun > 0 ? kRun : run;
      for (int64_t i = 0, block = 0; i < width; i += length, ++block) {
        Norm norm = {peaks[i], 0};
        for (int64_t j = 0; j < length; ++j) norm.units += units[i + j];
        norms[block] = norm.value();
      }
    });
  }
};

// Columns [c, c + kPair) of some rows: their peaks, and if asked for their sums.
template <bool kAdd, class T>
COREAI_HD void add_group(Strip& s, const T* x, int64_t stride, int rows, int64_t c) {
  constexpr bool kAlternate = __is_same(T, BFloat16);
  const int some = static_cast<int>(min<int64_t>(kPair, s.width - c));
  const bool alternate = kAlternate && some == kPair;
  F a = Simd::set(0.0f), b = a;
  if constexpr (kAdd) {
    a = Simd::load(s.scales + c), b = Simd::load(s.scales + c + kWidth);
    if (alternate) Simd::deinterleave(a, b);
  }
  Sums sums;
  const auto take = [&](Pair values) __attribute__((always_inline)) {
    if constexpr (kAdd) {
      sums.add(values, a, b);
    } else {
      sums.see(values);
    }
  };
  if (some < kPair) {
    for (int r = 0; r < rows; ++r) take(Pair::load_n(x + r * stride + c, some));
  } else if (rows == kAdditions) {
#pragma GCC unroll 16
    for (int r = 0; r < kAdditions; ++r) take(Pair::load(x + r * stride + c));
  } else {
    for (int r = 0; r < rows; ++r) take(Pair::load(x + r * stride + c));
  }
  if (alternate) {
    Simd::interleave(sums.peak.a, sums.peak.b);
    Simd::interleave(sums.units.a, sums.units.b);
  }
  Simd::store(s.peaks + c, Simd::imax(Simd::load(s.peaks + c), sums.peak.a));
  Simd::store(s.peaks + c + kWidth, Simd::imax(Simd::load(s.peaks + c + kWidth), sums.peak.b));
  if constexpr (kAdd) {
    uint32_t units[kPair];
    __builtin_memcpy(units, &sums.units, sizeof(units));
    for (int i = 0; i < kPair; ++i) s.units[c + i] += units[i];
  }
}

template <bool kAdd, class T>
void add_rows(Strip& s, const T* x, int64_t stride, int64_t rows, int64_t begin, int64_t end) {
  for (int64_t r = 0; r < rows; r += kAdditions) {
    const int some = static_cast<int>(min<int64_t>(kAdditions, rows - r));
    for (int64_t c = begin; c < end; c += kPair) add_group<kAdd>(s, x + r * stride, stride, some, c);
  }
}

template <class T>
bool norms_of_strip(const Bands& g, const T* x, int64_t width, double* norms) {
  Strip s(width, g.run);
  add_rows<false>(s, x, g.stride(), min(g.rows, max(kFirstRows, g.rows / 16)), 0, width);
  s.join_peaks();
  s.start(0, (width + kPair - 1) / kPair * kPair);  // all lanes of the last vectors
  add_rows<true>(s, x, g.stride(), g.rows, 0, width);
  if (g.rows > kFirstRows) {
    s.join_peaks();
    for (int64_t c = 0; c < width; c += kPair) {
      const int64_t end = min(width, c + kPair);
      if (!s.is_wrong(c, end)) continue;
      s.start(c, end);
      add_rows<true>(s, x, g.stride(), g.rows, c, end);
    }
  }
  s.values(norms);
  return !s.has_tiny();
}

template <class T>
bool norms_of_strips(const Bands& g, const T* x, double* norms) {
  int64_t width = kStrip;
  while (width > 2 * kShortRun && g.bands * (g.stride() / width) < threads()) width /= 2;
  width -= width % g.run;
  const int64_t strips = (g.stride() + width - 1) / width;
  int all_fine = 1;
  parallel_for(g.bands * strips, 1, max<int64_t>(1, kParallelElements / (g.rows * width)), [&](int64_t begin, int64_t end) {
    bool fine = true;
    for (; begin < end; ++begin) {
      const int64_t band = begin / strips, first = begin % strips * width;
      const int64_t some = min(width, g.stride() - first);
      fine &= norms_of_strip(g, x + band * g.rows * g.stride() + first, some, norms + band * g.columns + first / g.run);
    }
    if (!fine) __atomic_store_n(&all_fine, 0, __ATOMIC_RELAXED);
  });
  return all_fine != 0;
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
