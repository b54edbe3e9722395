// Parameters of blocks as the loops take them, and the quickest division by their scales.
#pragma once

#include "cpu/quantize/packed_bf16.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

template <class = void>
COREAI_HD float zero_point_of(const Affine& a, int64_t block) {
  return a.zero_point ? static_cast<float>(a.zero_point[block]) : a.constant;
}

// The quickest division of elements of type T by the first n scales. A corrected product with the reciprocal is as
// good as a division if scales are far from overflow and underflow, and if rounding and clamping change only at numbers
// of up to nine bits: tests/kernels/test_quotients.py compares the two around all of those.
template <class T, class K>
COREAI_HD Division choose_division(F scales, F low, F high, int n, bool finite, K kind) {
  const uint32_t all = static_cast<uint32_t>((uint64_t{1} << n) - 1);
  if constexpr (kHasPackedBf16<K, T>) {
    if (suit_packed_bf16(scales, low, high, all, kind)) {
      if (!finite) return Division::kPackedBf16;
      const bool powers = !K::kIsInt && (Simd::bits(are_powers(scales)) & all) == all;
      return powers ? Division::kPackedBf16ByPowers : Division::kPackedBf16OfFinite;
    }
  }
  if constexpr (!Simd::kHasQuotient) {
    return Division::kDivide;
  } else {
    const F kept = Simd::min(Simd::set(0x1p64f), Simd::max(Simd::set(0x1p-64f), scales));
    const auto is_short = [](F bound) __attribute__((always_inline)) {
      if constexpr (K::kIsInt) {
        return Simd::equal(bound, clamp_lanes<Simd>(bound, Simd::set(-255.0f), Simd::set(255.0f)));
      } else {
        return Simd::equal(bound, Simd::as_float(Simd::iand(Simd::as_int(bound), Simd::iset(-0x8000))));
      }
    };
    const M suits = Simd::mand(Simd::equal(scales, kept), Simd::mand(is_short(low), is_short(high)));
    if ((Simd::bits(suits) & all) != all) return Division::kDivide;
    return finite ? Division::kReciprocalOfFinite : Division::kReciprocal;
  }
}

// Calls body(kind) with the kind that computes quotients of elements of type T by that division.
template <class T, class K, class Body>
COREAI_HD void with_division(Division division, K kind, Body body) {
  if constexpr (kHasPackedBf16<K, T>) {
    if constexpr (!K::kIsInt) {
      if (division == Division::kPackedBf16ByPowers) return body(dividing_by<Division::kPackedBf16ByPowers>(kind));
    }
    if (division == Division::kPackedBf16OfFinite) return body(dividing_by<Division::kPackedBf16OfFinite>(kind));
    if (division == Division::kPackedBf16) return body(dividing_by<Division::kPackedBf16>(kind));
  }
  if constexpr (Simd::kHasQuotient) {
    if (division == Division::kReciprocalOfFinite) return body(dividing_by<Division::kReciprocalOfFinite>(kind));
    if (division == Division::kReciprocal) return body(dividing_by<Division::kReciprocal>(kind));
  }
  body(kind);
}

// Parameters of up to kWidth neighbouring blocks, ready to be broadcast one by one.
struct BlockParams {
  alignas(64) float scale[kWidth], low[kWidth], high[kWidth], offset[kWidth];
  alignas(64) float reciprocal[kWidth];  // or the one below it
  alignas(64) float above[kWidth], factor[kWidth], addend[kWidth];
  alignas(64) int32_t low_words[kWidth], high_words[kWidth], exponent[kWidth];
  Division division;

  // `finite`: no element is infinite, NaN or beyond 2^62.
  template <class T, class K>
  __attribute__((noinline)) void load(const Affine& a, int64_t block, int n, bool finite, K kind) {
    F zero_point = Simd::set(a.constant);
    if (a.zero_point && n == kWidth) {
      zero_point = Simd::to_float(Simd::load(a.zero_point + block));
    } else if (a.zero_point) {
      alignas(64) float values[kWidth] = {};
      for (int i = 0; i < n; ++i) values[i] = static_cast<float>(a.zero_point[block + i]);
      zero_point = Simd::load(values);
    }
    const F scales = Simd::load_n(a.scale + block, n);
    Simd::store(scale, scales);
    const F lows = Simd::sub(Simd::set(a.low), zero_point), highs = Simd::sub(Simd::set(a.high), zero_point);
    Simd::store(low, lows);
    Simd::store(high, highs);
    Simd::store(offset, a.offset ? Simd::load_n(a.offset + block, n) : Simd::set(0.0f));
    division = choose_division<T>(scales, lows, highs, n, finite, kind);
    if constexpr (kHasPackedBf16<K, T>) {
      if (division == Division::kPackedBf16 || division == Division::kPackedBf16OfFinite) {
        return store(packed_bf16_params<Simd>(scales, lows, highs, kind));
      }
      if constexpr (!K::kIsInt) {
        if (division == Division::kPackedBf16ByPowers) return store(packed_bf16_params_of_powers(scales, lows, highs, kind));
      }
    }
    if (division != Division::kDivide) Simd::store(reciprocal, Simd::div(Simd::set(1.0f), scales));
  }
  COREAI_HD Params<Simd> operator[](int i) const {
    return {Simd::set(scale[i]), Simd::set(low[i]), Simd::set(high[i]), Simd::set(offset[i]), Simd::set(reciprocal[i])};
  }
  COREAI_HD PackedBf16Params packed_bf16(int i) const {
    return {{Simd::set(reciprocal[i]), Simd::set(above[i]), Simd::set(factor[i]), Simd::set(addend[i])},
            {Simd::iset(low_words[i]), Simd::iset(high_words[i]), Simd::iset(exponent[i])}};
  }

 private:
  COREAI_HD void store(const PackedBf16Params& p) {
    Simd::store(reciprocal, p.below);
    Simd::store(above, p.above);
    Simd::store(factor, p.factor);
    Simd::store(addend, p.addend);
    Simd::store(low_words, p.low);
    Simd::store(high_words, p.high);
    Simd::store(exponent, p.exponent);
  }
};

template <class = void>
COREAI_HD Params<Simd> params_of_block(const Affine& a, int64_t block) {
  const float zero_point = zero_point_of(a, block);
  return {Simd::set(a.scale[block]), Simd::set(a.low - zero_point), Simd::set(a.high - zero_point),
          Simd::set(a.offset ? a.offset[block] : 0.0f), Simd::set(1.0f / a.scale[block])};
}

// Parameters of kWidth neighbouring blocks, one a lane.
template <class = void>
COREAI_HD Params<Simd> params_of_lanes(const Affine& a, int64_t block) {
  const F zero_point = a.zero_point ? Simd::to_float(Simd::load(a.zero_point + block)) : Simd::set(a.constant);
  return {Simd::load(a.scale + block), Simd::sub(Simd::set(a.low), zero_point), Simd::sub(Simd::set(a.high), zero_point),
          a.offset ? Simd::load(a.offset + block) : Simd::set(0.0f), Simd::set(0.0f)};
}

// Parameters of the blocks that the elements [column, column + n) of a row belong to, n <= kWidth. One copy for all
// formats and types: it takes longer to compile than what uses it.
template <class = void>
__attribute__((noinline)) Params<Simd> params_of_columns(const Affine& a, int64_t base, int64_t column, int64_t run, int n) {
  if (run == 1 && n == kWidth) return params_of_lanes(a, base + column);
  alignas(64) float scale[kWidth], zero_point[kWidth], offset[kWidth];
  for (int i = 0; i < n; ++i) {
    const int64_t block = base + (run == 1 ? column + i : (column + i) / run);
    scale[i] = a.scale[block];
    zero_point[i] = zero_point_of(a, block);
    offset[i] = a.offset ? a.offset[block] : 0.0f;
  }
  for (int i = n; i < kWidth; ++i) scale[i] = 1.0f, zero_point[i] = offset[i] = 0.0f;
  const F zero = Simd::load(zero_point);
  return {Simd::load(scale), Simd::sub(Simd::set(a.low), zero), Simd::sub(Simd::set(a.high), zero), Simd::load(offset),
          Simd::set(0.0f)};
}

// Parameters of kWidth neighbouring blocks, one a lane, and the quickest division by their scales.
struct ColumnParams {
  Params<Simd> lanes;
  Division division;

  template <class K>
  static COREAI_HD ColumnParams load(const Affine& a, int64_t block, int n, K kind) {
    ColumnParams p = {params_of_columns(a, block, 0, 1, n), Division::kDivide};
    p.division = choose_division<float>(p.lanes.scale, p.lanes.low, p.lanes.high, kWidth, a.finite, kind);
    if (p.division != Division::kDivide) p.lanes.reciprocal = Simd::div(Simd::set(1.0f), p.lanes.scale);
    return p;
  }
};

// The same of two vectors of packed bfloat16: of the even and of the odd columns.
struct PackedBf16Columns {
  PackedBf16Factors even, odd;
  PackedBf16Bounds bounds;

  // Returns whether packed bfloat16 suits these columns.
  template <class K>
  COREAI_HD bool load(const Affine& a, int64_t block, K kind) {
    Params<Simd> p = params_of_columns(a, block, 0, 1, kWidth);
    Params<Simd> q = params_of_columns(a, block + kWidth, 0, 1, kWidth);
    constexpr uint32_t kAll = static_cast<uint32_t>((uint64_t{1} << kWidth) - 1);
    if (!suit_packed_bf16(p.scale, p.low, p.high, kAll, kind)) return false;
    if (!suit_packed_bf16(q.scale, q.low, q.high, kAll, kind)) return false;
    Simd::deinterleave(p.scale, q.scale);
    Simd::deinterleave(p.low, q.low);
    Simd::deinterleave(p.high, q.high);
    const PackedBf16Params e = packed_bf16_params<Simd>(p.scale, p.low, p.high, kind);
    const PackedBf16Params o = packed_bf16_params<Simd>(q.scale, q.low, q.high, kind);
    const auto together = [](I a, I b) __attribute__((always_inline)) {
      return Simd::ior(Simd::iand(a, Simd::iset(0xffff)), Simd::iand(b, Simd::iset(-0x10000)));
    };
    even = e, odd = o;
    bounds = {together(e.low, o.low), together(e.high, o.high), together(e.exponent, o.exponent)};
    return true;
  }
};

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
