// Floating-point formats in ranges around zero: what is done to magnitudes needs one clamp, and no sign.
#pragma once

#include "common/element.h"

namespace coreai {

// As round_to_format, of a value that is not negative; or NaN, if nothing but NaN is made of it in S.
template <class S, Format kFormat>
COREAI_HD typename S::F round_magnitude_to_format(typename S::F x) {
  using Facts = FormatFacts<kFormat>;
  constexpr int kMore = 23 - Facts::kMantissaBits;
  const auto exponent = S::iadd(S::iand(S::as_int(x), S::iset(0x7f800000)), S::iset(kMore << 23));
  const auto magic = S::as_float(S::imax(exponent, S::iset((127 + Facts::kMinExponent + kMore) << 23)));
  return S::sub(S::add(x, magic), magic);
}

// The magnitude of what quantize_lanes gives where p.low == -p.high, for finite quotients by reciprocals; of others NaN. Its
// sign is that of x.
template <class S, class K>
COREAI_HD typename S::F quantize_magnitude(typename S::F x, const Params<S>& p, typename S::M& inside) {
  const auto magnitude = S::magnitude(S::finite_quotient(x, p.scale, p.reciprocal));
  const auto clamped = S::min(magnitude, p.high);
  inside = S::equal(magnitude, clamped);
  return round_magnitude_to_format<S, K::kFormat>(clamped);
}

}  // namespace coreai
