// Element maths: what happens to one value, written once for every lane width.
//
// `S` is a set of lanes (csrc/cpu/simd_*.h on the CPU, one lane per thread on a GPU) with types F (float32),
// I (int32) and M (mask), and the operations used below. Arithmetic is IEEE: no reassociation, no contraction.
#pragma once

#include "common/types.h"

// Of hosts alone. Inlined everywhere: a copy compiled for one instruction set must not be kept for all.
#define COREAI_HOST inline __attribute__((always_inline))
#if defined(__CUDACC__)
#define COREAI_HD __host__ __device__ __forceinline__
#else
#define COREAI_HD inline __attribute__((always_inline))
#endif

namespace coreai {

// Exponent of the largest quantized value: that of the format, of integers that of `quant_max`.
COREAI_HOST int largest_exponent(Format format, double quant_max) {
  switch (format) {
#define COREAI_CASE(name) \
  case Format::name:      \
    return FormatFacts<Format::name>::kMaxExponent;
    COREAI_FOR_EACH_FLOAT_FORMAT(COREAI_CASE)
#undef COREAI_CASE
    default:
      return __builtin_ilogb(quant_max);
  }
}

// Round to a 16-bit type and back: what storing an intermediate result in a tensor of that type does.
template <class S>
COREAI_HD typename S::F round_to_element(typename S::F x, Element element) {
  if (element == Element::kFloat16) return S::round_half(x);
  if (element != Element::kBFloat16) return x;
  if constexpr (requires { S::round_bfloat16(x); }) return S::round_bfloat16(x);
  const auto bits = S::as_int(x);
  const auto odd = S::iand(S::template shr<16>(bits), S::iset(1));
  const auto rounded = S::iadd(bits, S::iadd(odd, S::iset(0x7fff)));
  const auto kept = S::as_float(S::iand(rounded, S::iset(static_cast<int32_t>(0xffff0000))));
  return S::select(S::unordered(x, x), x, kept);
}

// How a floating-point format rounds.
struct FloatRounding {
  int32_t least;  // exponent, as it lies in a float32
  int32_t shift;  // 23 less the mantissa's bits, at the same place

  template <Format kFormat>
  static constexpr COREAI_HD FloatRounding of() {
    return {(127 + FormatFacts<kFormat>::kMinExponent) << 23, (23 - FormatFacts<kFormat>::kMantissaBits) << 23};
  }
};

// Of a floating-point format: round to nearest even at its last mantissa bit. Adding and subtracting 2^(e + 23 - mantissa
// bits) does it without a branch; e is clamped from below, so subnormals round at the format's own quantum.
template <class S>
COREAI_HD typename S::F round_to_format(typename S::F x, FloatRounding format) {
  const auto bits = S::as_int(x);
  const auto sign = S::iand(bits, S::iset(INT32_MIN));
  const auto magnitude = S::as_float(S::iand(bits, S::iset(0x7fffffff)));
  auto exponent = S::iand(bits, S::iset(0x7f800000));
  exponent = S::imax(exponent, S::iset(format.least));
  const auto magic = S::as_float(S::iadd(exponent, S::iset(format.shift)));
  const auto rounded = S::sub(S::add(magnitude, magic), magic);
  const auto with_sign = S::as_float(S::ior(S::as_int(rounded), sign));
  return S::select(S::unordered(x, x), x, with_sign);
}

template <class S, Format kFormat>
COREAI_HD typename S::F round_to_format(typename S::F x) {
  return round_to_format<S>(x, FloatRounding::of<kFormat>());
}

// How quotients are computed: by division; by a product with the scale's reciprocal and a correction; the same of
// values that are known to be finite. See `S::quotient` for when it may be used. Or not at all, but the results of
// packed bfloat16: see cpu/quantize/packed_bf16.h; of finite ones; of finite ones by powers of two.
enum class Division { kDivide, kReciprocal, kReciprocalOfFinite, kPackedBf16, kPackedBf16OfFinite, kPackedBf16ByPowers };

// What a quantized element is: a number format, and for integers whether an offset (the min-value formulation)
// is taken from the values.
template <Format kFormat_, bool kHasOffset_ = false, Division kDivision_ = Division::kDivide>
struct Kind {
  static constexpr Format kFormat = kFormat_;
  static constexpr bool kIsInt = kFormat == Format::kInt;
  static constexpr bool kHasOffset = kHasOffset_;
  static constexpr Division kDivision = kDivision_;
  static constexpr bool kIsPackedBf16 = kDivision >= Division::kPackedBf16;
  template <Division kOther>
  using By = Kind<kFormat_, kHasOffset_, kOther>;

  // A quotient that is in range; of integers it is rounded already.
  template <class S>
  static COREAI_HD typename S::F round(typename S::F q) {
    if constexpr (kIsInt) {
      return q;
    } else {
      return round_to_format<S, kFormat>(q);
    }
  }
};

// Parameters of the affine map for the lanes at hand. The range is the quantized range less the zero point.
template <class S>
struct Params {
  typename S::F scale, low, high, offset, reciprocal;
};

// The value in units of the scale; for integers less the offset and rounded.
template <class S, class K>
COREAI_HD typename S::F quotient_lanes(typename S::F x, const Params<S>& p) {
  if constexpr (K::kHasOffset) x = S::sub(x, p.offset);
  typename S::F q;
  if constexpr (K::kDivision == Division::kDivide) {
    q = S::div(x, p.scale);
  } else if constexpr (K::kDivision == Division::kReciprocal) {
    q = S::quotient(x, p.scale, p.reciprocal);
  } else {
    q = S::finite_quotient(x, p.scale, p.reciprocal);
    // The correction turns -0.0 into 0.0, which integers lose anyway.
    if constexpr (!K::kIsInt) q = S::with_sign_of(q, x);
  }
  if constexpr (K::kIsInt) {
    return S::round(q);
  } else {
    return q;
  }
}

// min and max return their second operand when unordered: NaN passes through.
template <class S>
COREAI_HD typename S::F clamp_lanes(typename S::F q, typename S::F low, typename S::F high) {
  return S::min(high, S::max(low, q));
}

// Quantized value less the zero point; `inside` tells where it was in range before clamping: NaN nowhere.
template <class S, class K>
COREAI_HD typename S::F quantize_lanes(typename S::F x, const Params<S>& p, typename S::M& inside, K kind = {}) {
  const auto q = quotient_lanes<S, K>(x, p);
  typename S::F clamped;
  // With an offset, what a zero's sign is can be seen in the result.
  if constexpr (!K::kHasOffset && requires { S::clamp(q, p.low, p.high); }) {
    clamped = S::clamp(q, p.low, p.high);
  } else {
    clamped = clamp_lanes<S>(q, p.low, p.high);
  }
  inside = S::equal(q, clamped);
  return kind.template round<S>(clamped);
}

template <class S, class K>
COREAI_HD typename S::F dequantize_lanes(typename S::F q, const Params<S>& p) {
  if constexpr (!K::kIsInt) {
    return S::mul(q, p.scale);
  } else if constexpr (K::kHasOffset) {
    return S::add(S::mul(q, p.scale), p.offset);
  } else {
    return S::mul_add_zero(q, p.scale);  // the sum turns -0.0 into 0.0
  }
}

}  // namespace coreai
