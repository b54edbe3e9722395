// Minimum and maximum of neighbouring blocks, one block a lane. NaN wins over numbers.
#pragma once

#include "cpu/quantize/qparams.h"
#include "cpu/simd_words.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

// Whether the instruction set has a minimum and maximum that NaN stays in.
template <class S>
constexpr bool kHasMinOrNan = requires(typename S::F x) { S::min_or_nan(x, x); };

// Lanes of a running minimum and maximum, and where NaN was seen; in those lanes the two are of no use.
template <class S>
struct ExtremesOf {
  F low = S::set(__builtin_inff());
  F high = S::set(-__builtin_inff());
  M seen = S::none();

  COREAI_HD void take(F x) {
    if constexpr (kHasMinOrNan<S>) {
      low = S::min_or_nan(x, low);
      high = S::max_or_nan(x, high);
    } else {
      low = S::min(x, low);
      high = S::max(x, high);
      seen = S::mor(seen, S::unordered(x, x));
    }
  }
  COREAI_HD void take(F x, F y) {
    if constexpr (kHasMinOrNan<S>) {
      take(x);
      take(y);
    } else {
      low = S::min(x, S::min(y, low));
      high = S::max(x, S::max(y, high));
      seen = S::mor(seen, S::unordered(x, y));
    }
  }
  COREAI_HD void take(const ExtremesOf& other) {
    if constexpr (kHasMinOrNan<S>) {
      take(other.low);
      high = S::max_or_nan(other.high, high);
    } else {
      low = S::min(other.low, low);
      high = S::max(other.high, high);
      seen = S::mor(seen, other.seen);
    }
  }
  COREAI_HD M nan() const { return kHasMinOrNan<S> ? S::unordered(low, high) : seen; }
};
using Extremes = ExtremesOf<Simd>;

template <class T>
COREAI_HD Extremes extremes_of(const T* x, int64_t n) {
  Extremes a;
  if (n < kWidth) {
    const F lanes = Simd::load_n(x, static_cast<int>(n));
    const M present = Simd::first(static_cast<int>(n));
    Extremes some;
    some.take(lanes);
    a.low = Simd::select(present, some.low, a.low);
    a.high = Simd::select(present, some.high, a.high);
    a.seen = Simd::mand(present, some.seen);
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
  for (int i = 0; i < blocks; ++i) nan |= static_cast<uint32_t>(Simd::any(extremes_of(x + i * run, run).nan())) << i;
  const M is_nan = Simd::from_bits(nan);
  const F quiet = Simd::set(__builtin_nanf(""));
  return {Simd::select(is_nan, quiet, range.low), Simd::select(is_nan, quiet, range.high)};
}

// Extremes of 16-bit elements, compared as words: twice the lanes, and nothing to widen.
//
// With the other bits of negative elements flipped, signed words have the order of the values, and NaN of either sign
// lies beyond the infinities. If zero is to be in the range, elements need not change: the largest of the words with a
// sign is the highest, or zero; the largest without a sign is the lowest, or -0.0.
template <class T, bool kWithZero>
struct WordExtremes {
  using W = Words<2>;
  using V = W::V;
  static constexpr int16_t kInfinity = kIsBFloat16<T> ? 0x7f80 : 0x7c00;

  V low = W::set(kWithZero ? INT16_MIN : INT16_MAX), high = W::set(kWithZero ? 0 : INT16_MIN);

  // Elements to keys, and back.
  static COREAI_HD V keys(V words) { return kWithZero ? words : words ^ ((words >> 15) & W::set(INT16_MAX)); }
  static COREAI_HD V lower(V a, V b) { return kWithZero ? W::max_unsigned(a, b) : W::min(a, b); }
  COREAI_HD void take(const T* x) { take({keys(W::load(x)), keys(W::load(x))}); }
  COREAI_HD void take(const WordExtremes& other) {
    low = lower(low, other.low);
    high = W::max(high, other.high);
  }
  // Extremes of n >= W::kLanes elements.
  static COREAI_HD WordExtremes of(const T* x, int64_t n) {
    WordExtremes a;
    int64_t i = 0;
    if (n >= 4 * W::kLanes) {
      WordExtremes b;
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
  // Of up to kWidth blocks, one a lane: two words of it each, still to be compared.
  template <class Lanes>
  static COREAI_HD WordExtremes of_blocks(const T* x, int64_t run, int blocks) {
    const auto of_rows = [](const F* low, const F* high) __attribute__((always_inline)) -> WordExtremes {
      const F lowest = kWithZero ? Lanes::unsigned_max_of_word_rows(low) : Lanes::min_of_word_rows(low);
      return {bits_as<V>(lowest), bits_as<V>(Lanes::max_of_word_rows(high))};
    };
    F low[kWidth], high[kWidth];
    if (run == W::kLanes && blocks == kWidth) {
      for (int i = 0; i < kWidth; ++i) low[i] = (F)keys(W::load(x + i * W::kLanes));
      return of_rows(low, low);
    }
    for (int i = 0; i < blocks; ++i) {
      const WordExtremes e = of(x + i * run, run);
      low[i] = (F)e.low, high[i] = (F)e.high;
    }
    for (int i = blocks; i < kWidth; ++i) low[i] = high[i] = Simd::set(0.0f);
    return of_rows(low, high);
  }
  COREAI_HD bool has_nan() const {
    const auto above = W::greater(high, W::set(kInfinity));
    const auto below = kWithZero ? W::greater(low, W::set(kInfinity | INT16_MIN))
                                 : W::greater(W::set(static_cast<int16_t>(~kInfinity)), low);
    return (W::bits(above) | W::bits(below)) != 0;
  }
};

// Lanes with the other half of each in front.
template <class V>
COREAI_HD V with_halves_swapped(V words) {
  return (V)Simd::ior(Simd::template shl<16>((I)words), Simd::template shr<16>((I)words));
}

// The lower half of each lane, as an element of type T.
template <class T, class V>
COREAI_HD F value_of_words(V words) {
  if constexpr (kIsBFloat16<T>) {
    return Simd::as_float(Simd::template shl<16>((I)words));
  } else {
    alignas(64) int32_t wide[kWidth];
    alignas(64) uint16_t narrow[kWidth];
    Simd::store(wide, (I)words);
    for (int i = 0; i < kWidth; ++i) narrow[i] = static_cast<uint16_t>(wide[i]);
    return Simd::load(reinterpret_cast<const T*>(narrow));
  }
}

// See `range_of_blocks`; here run >= Words<2>::kLanes, of a 16-bit type.
template <bool kWithZero, class T, class Lanes = Simd>
COREAI_HD Range range_of_word_blocks(const T* x, int64_t run, int blocks) {
  using Extremes = WordExtremes<T, kWithZero>;
  Extremes e, pairs = Extremes::template of_blocks<Lanes>(x, run, blocks);
  e.take(pairs);
  e.take({with_halves_swapped(pairs.low), with_halves_swapped(pairs.high)});
  const Range range = {value_of_words<T>(Extremes::keys(e.low)), value_of_words<T>(Extremes::keys(e.high))};
  return __builtin_expect(e.has_nan(), false) ? with_nan(x, run, blocks, range) : range;
}

// Lane i: the range of block i, of `blocks` <= kWidth blocks of `run` neighbouring elements. With zero in it, if wanted.
template <bool kWithZero = false, class T>
COREAI_HD Range range_of_blocks(const T* x, int64_t run, int blocks) {
  if constexpr (Simd::kHasWordRows && sizeof(T) == 2) {
    if (run >= Words<2>::kLanes) return range_of_word_blocks<kWithZero>(x, run, blocks);
  }
  F low[kWidth], high[kWidth];
  M nan = Simd::none();
  for (int i = 0; i < blocks; ++i) {
    const Extremes e = extremes_of(x + i * run, run);
    low[i] = e.low, high[i] = e.high;
    nan = Simd::mor(nan, e.nan());
  }
  for (int i = blocks; i < kWidth; ++i) low[i] = high[i] = Simd::set(0.0f);
  Range range = {Simd::min_of_rows(low), Simd::max_of_rows(high)};
  if (kWithZero) range = {at_most_zero<Simd>(range.low), at_least_zero<Simd>(range.high)};
  return __builtin_expect(Simd::any(nan), false) ? with_nan(x, run, blocks, range) : range;
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
