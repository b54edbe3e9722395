// fake_quantize of bfloat16 by scales that are bfloat16 too: what is costly in general is cheap with eight bits.
//
// - Values are clamped before they are divided, as words. Which words are inside is known from the scale.
// - Let h be a number of up to nine bits where rounding changes. An element x is h * scale or differs from it by
//   2^-18 of it at least, so that a product with the reciprocal is on that side of h where the quotient is, whichever
//   way the reciprocal was rounded. Where x is h * scale, the products with reciprocals too small and too large round
//   to the two neighbours of h; the sum of these, which has one bit less, rounds to twice the even one.
// - A value times the scale has at most sixteen bits. Veltkamp's splitting (T. J. Dekker, Numer. Math. 18, 1971)
//   rounds them to eight, ties to even.
#pragma once

#include "cpu/loops.h"
#include "cpu/simd_words.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

template <class K, class T>
constexpr bool kHasPackedBf16 = Simd::kHasBf16Products && kIsBFloat16<T> && !K::kHasOffset;

// Adding this to a small number rounds it to a whole one.
constexpr float kWhole = 0x1.8p23f;

// The word of 1.0, whose exponent is zero.
constexpr int32_t kOne = 127 << 23;

// Parameters of every other element, one a lane.
struct PackedBf16Factors {
  F below, above;    // the scale's reciprocal, a little less unless it is exact, and a little more
  F factor, addend;  // see `requantize`
};

// Parameters as words, one an element.
struct PackedBf16Bounds {
  I low, high;  // the least and the greatest element that is not clamped
  I exponent;   // see `magic_words`
};

// The same for both elements of a lane.
struct PackedBf16Params : PackedBf16Factors, PackedBf16Bounds {};

template <class K>
COREAI_HD bool suit_packed_bf16(F scales, F low, F high, uint32_t lanes, K kind) {
  const F kept = Simd::min(Simd::set(0x1p64f), Simd::max(Simd::set(0x1p-64f), scales));
  M fit = Simd::equal(scales, Simd::as_float(Simd::iand(Simd::as_int(kept), Simd::iset(-0x10000))));
  F least, most;
  if constexpr (K::kIsInt) {
    // Of the numbers that round to a bound beyond these, none need be an element.
    least = clamp_lanes<Simd>(low, Simd::set(-128.0f), Simd::set(0.0f));
    most = clamp_lanes<Simd>(high, Simd::set(0.0f), Simd::set(128.0f));
  } else {
    least = Simd::set(-kind.largest), most = Simd::set(kind.largest);
  }
  fit = Simd::mand(fit, Simd::mand(Simd::equal(low, least), Simd::equal(high, most)));
  return (Simd::bits(fit) & lanes) == lanes;
}

// Whether products with the reciprocal are never between two values, or round as they should if it is a little too
// small: if three times the scale is no bfloat16, only its half lies between two values, and that rounds to zero.
inline bool has_no_ties(float scale) {
  const float three = 3.0f * scale;
  uint32_t bits[2];
  __builtin_memcpy(bits, &three, 4);
  __builtin_memcpy(bits + 1, &scale, 4);
  return (bits[0] & 0xffff) != 0 || (bits[1] & 0x7fffff) == 0;
}

template <class = void>
COREAI_HD M are_powers(F scales) {
  return Simd::equal(scales, Simd::as_float(Simd::iand(Simd::as_int(scales), Simd::iset(0x7f800000))));
}

// Upper halves, in both.
template <class = void>
COREAI_HD I in_both_halves(I bits) {
  const I upper = Simd::iand(bits, Simd::iset(-0x10000));
  return Simd::ior(upper, Simd::template shr<16>(upper));
}

template <class S, class K>
COREAI_HD PackedBf16Params packed_bf16_params(F scale, F low, F high, K kind) {
  PackedBf16Params p;
  const I reciprocal = Simd::as_int(S::near_reciprocal(scale));
  const F less = Simd::as_float(Simd::iadd(reciprocal, Simd::iset(-2)));
  p.below = Simd::select(are_powers(scale), Simd::as_float(reciprocal), less);
  p.above = Simd::as_float(Simd::iadd(reciprocal, Simd::iset(2)));
  if constexpr (K::kIsInt) {
    p.factor = Simd::mul(scale, Simd::set(0.5f));
    p.addend = Simd::mul(scale, Simd::set(-kWhole));
    // An even bound is what halfway to the next number rounds to; of an odd one, what is nearer to zero.
    const auto last = [&](F bound, float half) __attribute__((always_inline)) {
      const F end = Simd::mul(Simd::add(bound, Simd::set(half)), scale);
      const F even = Simd::mul(Simd::set(2.0f), Simd::round(Simd::mul(bound, Simd::set(0.5f))));
      const I odd = Simd::as_int(Simd::select(Simd::equal(even, bound), Simd::set(0.0f), Simd::as_float(Simd::iset(-1))));
      return in_both_halves(Simd::iadd(Simd::as_int(end), odd));
    };
    p.low = last(low, -0.5f), p.high = last(high, 0.5f);
    p.exponent = Simd::iset(0);
  } else {
    p.factor = Simd::mul(scale, Simd::set(0x1.0001p15f));
    p.addend = Simd::mul(scale, Simd::set(-0x1p15f));
    p.low = in_both_halves(Simd::as_int(Simd::mul(low, scale)));
    p.high = in_both_halves(Simd::as_int(Simd::mul(high, scale)));
    p.exponent = in_both_halves(Simd::iadd(Simd::as_int(scale), Simd::iset(-(kOne + kind.rounding.shift))));
  }
  return p;
}

// The same for scales that are powers of two: quotients are elements.
template <class K>
COREAI_HD PackedBf16Params packed_bf16_params_of_powers(F scale, F low, F high, K kind) {
  PackedBf16Params p = {};
  p.low = in_both_halves(Simd::as_int(Simd::mul(low, scale)));
  p.high = in_both_halves(Simd::as_int(Simd::mul(high, scale)));
  p.exponent = in_both_halves(Simd::iadd(Simd::as_int(scale), Simd::iset(kind.rounding.least - kOne)));
  return p;
}

// Every other word, as bfloat16.
template <class V>
COREAI_HD F even_words(V words) {
  return Simd::as_float(Simd::template shl<16>((I)words));
}
template <class V>
COREAI_HD F odd_words(V words) {
  return Simd::as_float(Simd::iand((I)words, Simd::iset(-0x10000)));
}

// For each magnitude a number whose last bit is the last that the format keeps of the quotient. The difference of the
// words is the quotient's exponent and some mantissa, which does not matter: it has no more than eight bits.
template <class K, class V>
COREAI_HD V magic_words(V magnitudes, V exponent, FloatRounding format) {
  using W = Words<2>;
  if constexpr (K::kDivision == Division::kPackedBf16ByPowers) {
    return W::max(magnitudes, exponent) + W::set(static_cast<int16_t>(format.shift >> 16));
  } else {
    return W::max(magnitudes - exponent, W::set(static_cast<int16_t>((format.least + format.shift) >> 16)));
  }
}

// The scale times the rounded quotient, rounded to bfloat16: the upper halves of the lanes.
template <class S, class K, bool kNoTies>
COREAI_HD I requantize(typename S::F x, typename S::F magic, const PackedBf16Factors& p) {
  if constexpr (K::kDivision == Division::kPackedBf16ByPowers) {
    return S::as_int(S::sub(S::add(x, magic), magic));
  } else {
    // Once or twice the quotient, rounded, and as many times `magic`.
    auto q = S::fma(x, p.below, magic);
    if constexpr (!kNoTies) q = S::add(q, S::fma(x, p.above, magic));
    if constexpr (K::kIsInt) {
      const auto y = S::fma(q, kNoTies ? S::add(p.factor, p.factor) : p.factor, p.addend);
      return S::as_int(S::fma(y, S::set(-0x1p16f), S::mul(y, S::set(0x1.0001p16f))));
    } else {
      q = S::fma(magic, S::set(kNoTies ? -1.0f : -2.0f), q);
      const auto upper = kNoTies ? S::add(p.addend, p.addend) : p.addend;
      return S::as_int(S::fma(q, upper, S::mul(q, kNoTies ? S::add(p.factor, p.factor) : p.factor)));
    }
  }
}

// 2 * kWidth elements, and the parameters of every other one.
template <class Bits, bool kNoTies = false, class K>
COREAI_HD void fake_quantize_packed_bf16(typename Words<2>::V words, BFloat16* y, const PackedBf16Factors& even,
                                         const PackedBf16Factors& odd, const PackedBf16Bounds& bounds,
                                         typename Bits::Cursor& cursor, K kind) {
  using W = Words<2>;
  using V = typename W::V;
  const V low = bits_as<V>(bounds.low), high = bits_as<V>(bounds.high);
  const auto clamped = W::min_unsigned(W::min(words, high), low);
  const auto sign = words & W::set(INT16_MIN);
  auto inside = W::equal(words, clamped);
  F magic[2] = {Simd::set(kWhole), Simd::set(kWhole)};
  if constexpr (!K::kIsInt) {
    const auto magics = magic_words<K>(clamped ^ sign, bits_as<V>(bounds.exponent), kind.rounding) | sign;
    magic[0] = even_words(magics), magic[1] = odd_words(magics);
  }
  const I a = requantize<Simd, K, kNoTies>(even_words(clamped), magic[0], even);
  const I b = requantize<Simd, K, kNoTies>(odd_words(clamped), magic[1], odd);
  auto result = bits_as<V>(Simd::ior(Simd::template shr<16>(a), b));
  if constexpr (!K::kIsInt) result |= sign;
  if constexpr (K::kDivision == Division::kPackedBf16) {
    const auto nan = W::greater(words ^ sign, W::set(0x7f80));
    result = W::where(~nan, result) | W::where(nan, W::set(0x7fc0));
    inside = inside & ~nan;
  }
  W::store(y, result);
  Bits::put_pair(cursor, static_cast<uint32_t>(W::bits(inside)));
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
