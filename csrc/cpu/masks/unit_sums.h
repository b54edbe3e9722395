// Magnitudes as counts of units, added up: see common/exact_sum.h.
#pragma once

#include "common/exact_sum.h"
#include "cpu/loops.h"
#include "cpu/simd_words.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

constexpr int32_t kInfinityKey = 0x7f800000;
constexpr int kPair = 2 * kWidth;
constexpr int kAdditions = 1 << (32 - kUnitBits);  // of counts that 32 bits hold
constexpr int64_t kShortRun = 64;                  // shorter ones are added up as columns

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
COREAI_HD int unit_field(int32_t peak) { return max(kLeastUnit, raw_unit(peak)); }
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
    return {Simd::iand(Simd::template shl<16>(words), Simd::iset(0x7fffffff)), Simd::iand(words, Simd::iset(0x7fff0000))};
  }
  // The first and the second half, and zeros from the n-th on.
  template <class T>
  static COREAI_HD Pair load_n(const T* x, int n) {
    const int first = min(n, kWidth);
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

// By quarters of vectors first: lanes are slow to take out.
COREAI_HD int32_t largest_lane(I peaks) {
  typedef int32_t Quarter __attribute__((vector_size(16)));
  Quarter q[sizeof(I) / sizeof(Quarter)];
  __builtin_memcpy(q, &peaks, sizeof(q));
  for (uint64_t i = 1; i < sizeof(I) / sizeof(Quarter); ++i) q[0] = q[0] > q[i] ? q[0] : q[i];
  return max(max(q[0][0], q[0][1]), max(q[0][2], q[0][3]));
}
COREAI_HD uint64_t sum_of_lanes(Counts units) {
  typedef uint64_t Quarter __attribute__((vector_size(16)));
  Quarter q[sizeof(Counts) / sizeof(Quarter)];
  __builtin_memcpy(q, &units, sizeof(q));
  for (uint64_t i = 1; i < sizeof(Counts) / sizeof(Quarter); ++i) q[0] += q[i];
  return q[0][0] + q[0][1];
}

// How kPair neighbours are added up.
template <class T>
struct Addition {
  F scale;

  explicit Addition(float scale_) : scale(Simd::set(scale_)) {}
  COREAI_HD void add(Sums& sums, const T* x) const { sums.add(Pair::load(x), scale, scale); }
  COREAI_HD void add_n(Sums& sums, const T* x, int n) const { sums.add(Pair::load_n(x, n), scale, scale); }
  static COREAI_HD I peaks(const Sums& sums) { return Simd::imax(sums.peak.a, sums.peak.b); }
};

// Of bfloat16 both halves of a word at once, as long as the scale is a power of two that is added to exponents: zeros
// and subnormals become numbers then, but far below half a unit.
template <class W>
struct WordAddition {
  using V = typename W::V;
  static constexpr bool kPossible = W::kLanes == kPair;
  V shift;

  static COREAI_HD int exponent(float scale) { return (bits_of(scale) >> 23) - 127; }
  static COREAI_HD bool fits(float scale) { return exponent(scale) >= 0 && exponent(scale) <= 120; }
  explicit WordAddition(float scale) : shift(W::set(static_cast<int16_t>(exponent(scale) << 7))) {}

  COREAI_HD void add(Sums& sums, const BFloat16* x) const { add(sums, W::load(x)); }
  COREAI_HD void add_n(Sums& sums, const BFloat16* x, int n) const {
    V words = {};
    __builtin_memcpy(&words, x, static_cast<uint64_t>(n) * sizeof(BFloat16));
    add(sums, words);
  }
  COREAI_HD void add(Sums& sums, V words) const {
    const V magnitudes = words & W::set(0x7fff);
    sums.peak.a = __builtin_bit_cast(I, W::max(__builtin_bit_cast(V, sums.peak.a), magnitudes));
    const I scaled = __builtin_bit_cast(I, magnitudes + shift);
    const F even = Simd::as_float(Simd::template shl<16>(scaled));
    const F odd = Simd::as_float(Simd::iand(scaled, Simd::iset(static_cast<int32_t>(0xffff0000))));
    sums.units.a = Simd::iadd(sums.units.a, Simd::nearest(even));
    sums.units.b = Simd::iadd(sums.units.b, Simd::nearest(odd));
  }
  static COREAI_HD I peaks(const Sums& sums) {
    return Simd::imax(Simd::template shl<16>(sums.peak.a), Simd::iand(sums.peak.a, Simd::iset(0x7fff0000)));
  }
};

template <class T, class Add>
COREAI_HD Norm norm_of(const T* x, int64_t rows, int64_t stride, int64_t run, Add addition) {
  I peak = Simd::iset(0);
  Counts units = {};
  const auto take = [&](const Sums& sums) __attribute__((always_inline)) {
    peak = Simd::imax(peak, Add::peaks(sums));
    units += widened(sums.units.a) + widened(sums.units.b);
  };
  for (; rows > 0; --rows, x += stride) {
    int64_t i = 0;
    for (; i + kAdditions * kPair <= run; i += kAdditions * kPair) {
      Sums sums;
#pragma GCC unroll 16
      for (int j = 0; j < kAdditions; ++j) addition.add(sums, x + i + j * kPair);
      take(sums);
    }
    if (i < run) {
      Sums sums;
      for (; i + kPair <= run; i += kPair) addition.add(sums, x + i);
      if (i < run) addition.add_n(sums, x + i, static_cast<int>(run - i));
      take(sums);
    }
  }
  return {largest_lane(peak), sum_of_lanes(units)};
}

template <class T>
Norm norm_of(const T* x, int64_t rows, int64_t stride, int64_t run, float scale) {
  if constexpr (__is_same(T, BFloat16) && WordAddition<Words<2>>::kPossible) {
    using Add = WordAddition<Words<2>>;
    if (Add::fits(scale)) return norm_of(x, rows, stride, run, Add(scale));
  }
  return norm_of(x, rows, stride, run, Addition<T>(scale));
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
