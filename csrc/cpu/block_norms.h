// L1 norms of blocks, as the reference defines them: counts of units, whose sums no order of additions changes.
//
// The unit depends on the block's largest magnitude, which is known in the end only. So blocks are added up with a
// unit that is guessed from some of their elements, or from their neighbours, and once more where the guess was wrong:
// one read of the memory mostly, two at most.
#pragma once

#include "common/exact_sum.h"
#include "cpu/any_norms.h"
#include "cpu/loops.h"

namespace coreai::cpu::COREAI_LEVEL {
namespace {

constexpr int32_t kInfinityKey = 0x7f800000;
constexpr int kPair = 2 * kWidth;
constexpr int kAdditions = 1 << (32 - kUnitBits);  // of counts that 32 bits hold
constexpr int64_t kShortRun = 64;                  // shorter ones are added up as columns
constexpr int64_t kStrip = 1024;                   // columns whose sums stay in the nearest cache
constexpr int64_t kFirstRows = 64;                 // that a guess is made from, at least

typedef uint64_t Counts __attribute__((vector_size(4 * kWidth)));

// The memory as bands x rows x columns x run: a block is a column of a band, `rows` runs of neighbouring elements.
struct Bands {
  int64_t bands = 1, rows = 1, columns, run;

  int64_t stride() const { return columns * run; }
  int64_t block_elements() const { return rows * run; }
};

COREAI_HD int32_t bits_of(float x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}
COREAI_HD float float_of(int32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

// The factor that makes units of a block's values: a float32, so that there is a least unit. Blocks of which all
// values are so small that theirs is less are `tiny`.
constexpr int kFieldToDouble = 1023 - 127, kLeastUnit = 1023 - 124;
COREAI_HD int raw_unit(int32_t peak) { return unit_exponent((peak >> 23) + kFieldToDouble); }
COREAI_HD bool is_tiny(int32_t peak) { return peak != 0 && raw_unit(peak) < kLeastUnit; }
COREAI_HD int unit_field(int32_t peak) { return larger(kLeastUnit, raw_unit(peak)); }
COREAI_HD float scale_for(int32_t peak) { return float_of((127 + 1023 - unit_field(peak)) << 23); }

struct Norm {
  int32_t peak = 0;  // bits of the largest magnitude; above infinity's if there is a NaN
  uint64_t units = 0;

  // Of a block with an infinity or a NaN nothing else counts.
  COREAI_HD double value() const {
    const double sum = static_cast<double>(static_cast<int64_t>(units)) * power_of_two(unit_field(peak));
    const double special = peak == kInfinityKey ? __builtin_inf() : __builtin_nan("");
    return peak < kInfinityKey ? sum : special;
  }
};

COREAI_HD I magnitude_bits(F x) { return Simd::iand(Simd::as_int(x), Simd::iset(0x7fffffff)); }

// Magnitudes of 2 * kWidth neighbours: the first half of them and the second; of bfloat16 the even ones and the odd
// ones, which takes the fewest instructions.
struct Pair {
  I a, b;

  template <class T>
  static COREAI_HD Pair load(const T* x) {
    return {magnitude_bits(Simd::load(x)), magnitude_bits(Simd::load(x + kWidth))};
  }
  static COREAI_HD Pair load(const BFloat16* x) {
    I words;
    __builtin_memcpy(&words, x, sizeof(words));
    return {Simd::iand(Simd::template shl<16>(words), Simd::iset(0x7fffffff)),
            Simd::iand(words, Simd::iset(0x7fff0000))};
  }
  // The first and the second half, and zeros from the n-th on.
  template <class T>
  static COREAI_HD Pair load_n(const T* x, int n) {
    const int first = smaller(n, kWidth);
    return {magnitude_bits(Simd::load_n(x, first)), magnitude_bits(Simd::load_n(x + first, n - first))};
  }
};

struct Sums {
  Pair peak = {Simd::iset(0), Simd::iset(0)}, units = {Simd::iset(0), Simd::iset(0)};

  COREAI_HD void see(Pair x) {
    peak.a = Simd::imax(peak.a, x.a);
    peak.b = Simd::imax(peak.b, x.b);
  }
  COREAI_HD void add(Pair x, F scale_a, F scale_b) {
    see(x);
    units.a = Simd::iadd(units.a, Simd::nearest(Simd::mul(Simd::as_float(x.a), scale_a)));
    units.b = Simd::iadd(units.b, Simd::nearest(Simd::mul(Simd::as_float(x.b), scale_b)));
  }
};

COREAI_HD Counts widened(I units) {
  Counts both;
  __builtin_memcpy(&both, &units, sizeof(both));
  return (both & 0xffffffff) + (both >> 32);
}

template <class T>
COREAI_HD Norm norm_of(const T* x, int64_t rows, int64_t stride, int64_t run, float scale) {
  const F scales = Simd::set(scale);
  I peak = Simd::iset(0);
  Counts units = {};
  const auto take = [&](const Sums& sums) __attribute__((always_inline)) {
    peak = Simd::imax(peak, Simd::imax(sums.peak.a, sums.peak.b));
    units += widened(sums.units.a) + widened(sums.units.b);
  };
  for (; rows > 0; --rows, x += stride) {
    int64_t i = 0;
    for (; i + kAdditions * kPair <= run; i += kAdditions * kPair) {
      Sums sums;
#pragma GCC unroll 16
      for (int j = 0; j < kAdditions; ++j) sums.add(Pair::load(x + i + j * kPair), scales, scales);
      take(sums);
    }
    if (i < run) {
      Sums sums;
      for (; i + kPair <= run; i += kPair) sums.add(Pair::load(x + i), scales, scales);
      if (i < run) sums.add(Pair::load_n(x + i, static_cast<int>(run - i)), scales, scales);
      take(sums);
    }
  }
  Norm norm;
  alignas(64) int32_t peaks[kWidth];
  Simd::store(peaks, peak);
  for (int i = 0; i < kWidth; ++i) norm.peak = larger(norm.peak, peaks[i]);
  for (int i = 0; i < kWidth / 2; ++i) norm.units += units[i];
  return norm;
}

// False if a block is tiny.
template <class T>
bool norms_of_runs(const Bands& g, const T* x, double* norms) {
  int all_fine = 1;
  share(g.bands * g.columns, 1, larger<int64_t>(1, kParallelElements / g.block_elements()),
        [&](int64_t begin, int64_t end) {
          float scale = 0.0f;
          bool fine = true;
          for (int64_t i = begin; i < end; ++i) {
            const T* block = x + (i / g.columns * g.rows * g.columns + i % g.columns) * g.run;
            if (i == begin) scale = scale_for(norm_of(block, 1, 0, smaller(g.run, kStrip), 0.0f).peak);
            Norm norm = norm_of(block, g.rows, g.stride(), g.run, scale);
            if (scale_for(norm.peak) != scale) {
              scale = scale_for(norm.peak);
              norm = norm_of(block, g.rows, g.stride(), g.run, scale);
            }
            fine &= !is_tiny(norm.peak);
            norms[i] = norm.value();
          }
          if (!fine) __atomic_store_n(&all_fine, 0, __ATOMIC_RELAXED);
        });
  return all_fine != 0;
}

// Sums of neighbouring columns.
struct Strip {
  int64_t width, run;
  alignas(64) int32_t peaks[kStrip];
  alignas(64) float scales[kStrip];
  alignas(64) uint64_t units[kStrip];

  Strip(int64_t columns, int64_t run_) : width(columns), run(run_) {
    __builtin_memset(peaks, 0, sizeof(peaks));
    __builtin_memset(units, 0, sizeof(units));
  }

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
      default:
        return body.template operator()<0>();
    }
  }

  // Gives all columns of a block the largest of their peaks.
  void join_peaks() {
    with_run(run, [this]<int kRun>() {
      const int64_t length = kRun > 0 ? kRun : run;
      for (int64_t i = 0; i < width; i += length) {
        int32_t peak = 0;
        for (int64_t j = 0; j < length; ++j) peak = larger(peak, peaks[i + j]);
        for (int64_t j = 0; j < length; ++j) peaks[i + j] = peak;
      }
    });
  }
  void set_scales() {
    for (int64_t i = 0; i < width; ++i) scales[i] = scale_for(peaks[i]);
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
  void values(double* norms) const {
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
  const int some = static_cast<int>(smaller<int64_t>(kPair, s.width - c));
  const bool alternate = kAlternate && some == kPair;
  F a = Simd::load(s.scales + c), b = Simd::load(s.scales + c + kWidth);
  if (alternate) Simd::deinterleave(a, b);
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
    const int some = static_cast<int>(smaller<int64_t>(kAdditions, rows - r));
    for (int64_t c = begin; c < end; c += kPair) add_group<kAdd>(s, x + r * stride, stride, some, c);
  }
}

template <class T>
bool norms_of_strip(const Bands& g, const T* x, int64_t width, double* norms) {
  Strip s(width, g.run);
  add_rows<false>(s, x, g.stride(), smaller(g.rows, larger(kFirstRows, g.rows / 16)), 0, width);
  s.join_peaks();
  s.set_scales();
  add_rows<true>(s, x, g.stride(), g.rows, 0, width);
  if (g.rows > kFirstRows) {
    s.join_peaks();
    const Strip first = s;
    s.set_scales();
    for (int64_t c = 0; c < width; c += kPair) {
      const int64_t end = smaller(width, c + kPair);
      if (!first.is_wrong(c, end)) continue;
      for (int64_t i = c; i < end; ++i) s.units[i] = 0;
      add_rows<true>(s, x, g.stride(), g.rows, c, end);
    }
  }
  s.values(norms);
  return !s.has_tiny();
}

template <class T>
bool norms_of_strips(const Bands& g, const T* x, double* norms) {
  int64_t width = kStrip;
  while (width > kPair && width > 2 * kShortRun && g.bands * (g.stride() / width) < threads()) width /= 2;
  width -= width % g.run;
  const int64_t strips = (g.stride() + width - 1) / width;
  int all_fine = 1;
  share(g.bands * strips, 1, larger<int64_t>(1, kParallelElements / (g.rows * width)),
        [&](int64_t begin, int64_t end) {
          bool fine = true;
          for (; begin < end; ++begin) {
            const int64_t band = begin / strips, first = begin % strips * width;
            const int64_t some = smaller(width, g.stride() - first);
            fine &= norms_of_strip(g, x + band * g.rows * g.stride() + first, some,
                                   norms + band * g.columns + first / g.run);
          }
          if (!fine) __atomic_store_n(&all_fine, 0, __ATOMIC_RELAXED);
        });
  return all_fine != 0;
}

// False, with nothing of use written, if the blocks are of another kind, or one is tiny.
template <class T>
bool norms_of_bands(const Geometry& g, const T* x, double* norms) {
  Bands bands;
  bands.columns = g.columns, bands.run = g.run;
  if (g.outer_axes > 2) return false;
  // The innermost of the outer axes lies within blocks: those beside each other are columns already.
  if (g.outer_axes > 0) bands.rows = g.outer[g.outer_axes - 1].size;
  if (g.outer_axes > 1) bands.bands = g.outer[0].size;
  return g.run < kShortRun ? norms_of_strips(bands, x, norms) : norms_of_runs(bands, x, norms);
}

void block_norms(const Geometry& g, Element element, const void* x, double* norms) {
  if (element == Element::kFloat64) return any_norms(g, static_cast<const double*>(x), norms);
  with_type(element, [&](auto type) {
    const auto* data = static_cast<const typename decltype(type)::type*>(x);
    if (!norms_of_bands(g, data, norms)) any_norms(g, data, norms);
  });
}

}  // namespace
}  // namespace coreai::cpu::COREAI_LEVEL
