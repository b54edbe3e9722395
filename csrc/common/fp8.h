// Codes of the 8-bit floating-point formats, as many at a time as S has lanes.
#pragma once

#include "common/element.h"

namespace coreai {

// fp8 bits of values that the format can represent. NaN is the pattern of all ones.
template <class S, Format kFormat>
COREAI_HD typename S::I encode_fp8(typename S::F x) {
  using F = typename S::F;
  using I = typename S::I;
  constexpr int kMantissaBits = FormatFacts<kFormat>::kMantissaBits, kMinExponent = FormatFacts<kFormat>::kMinExponent;
  const I bits = S::as_int(x), magnitude = S::iand(bits, S::iset(0x7fffffff));
  const I above = S::imax(S::iset(0), S::iadd(magnitude, S::iset(-((127 + kMinExponent) << 23))));
  const I normal = S::iadd(S::template shr<23 - kMantissaBits>(above), S::iset(1 << kMantissaBits));
  // The code of a subnormal is the number of its quanta, which for normal numbers is no less than their code.
  const float per_quantum = __builtin_ldexpf(1.0f, kMantissaBits - kMinExponent);
  const F quanta = S::mul(S::as_float(magnitude), S::set(per_quantum));
  const I code = S::imin(normal, S::truncate(S::min(S::set(0x1p20f), quanta)));
  const F or_nan = S::select(S::unordered(x, x), S::as_float(S::iset(0x7f)), S::as_float(code));
  return S::ior(S::as_int(or_nan), S::iand(S::template shr<24>(bits), S::iset(0x80)));
}

template <class S>
COREAI_HD typename S::M at_least(typename S::F x, float bound) {
  return S::equal(S::max(S::set(bound), x), x);
}

template <class S, Format kFormat>
COREAI_HD typename S::F decode_fp8(typename S::I code) {
  using F = typename S::F;
  using I = typename S::I;
  constexpr int kMantissaBits = FormatFacts<kFormat>::kMantissaBits, kMinExponent = FormatFacts<kFormat>::kMinExponent;
  constexpr bool kHasInfinity = FormatFacts<kFormat>::kHasInfinity;
  const I magnitude = S::iand(code, S::iset(0x7f));
  const F count = S::to_float(magnitude);
  const F subnormal = S::mul(count, S::set(__builtin_ldexpf(1.0f, kMinExponent - kMantissaBits)));
  const I shifted = S::template shl<23 - kMantissaBits>(magnitude);
  const F normal = S::as_float(S::iadd(shifted, S::iset((126 + kMinExponent) << 23)));
  F value = S::select(at_least<S>(count, 1 << kMantissaBits), normal, subnormal);
  constexpr int kTop = kHasInfinity ? (0x7f >> kMantissaBits) << kMantissaBits : 0x7f;
  if (kHasInfinity) value = S::select(at_least<S>(count, kTop), S::set(__builtin_inff()), value);
  value = S::select(at_least<S>(count, kHasInfinity ? kTop + 1 : kTop), S::set(__builtin_nanf("")), value);
  return S::as_float(S::ior(S::as_int(value), S::template shl<24>(S::iand(code, S::iset(0x80)))));
}

}  // namespace coreai
