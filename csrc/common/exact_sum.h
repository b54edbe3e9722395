// Sums of magnitudes that no order of additions changes: the values are rounded to a unit so large that float64
// holds every sum of them exactly (Demmel and Nguyen, Fast Reproducible Floating-Point Summation, ARITH 2013).
#pragma once

#include "common/element.h"

namespace coreai {

// Bits that count up to n: the power of two that n values of one exponent stay below.
COREAI_HD int bits_to_count(int64_t n) {
  int bits = 0;
  while (bits < 62 && (int64_t{1} << bits) < n) ++bits;
  return bits;
}

// Exponent field of the unit for n values, the largest of which is `peak`.
COREAI_HD int unit_exponent(double peak, int bits_of_count) {
  int64_t bits;
  __builtin_memcpy(&bits, &peak, sizeof(bits));
  const int exponent = static_cast<int>(bits >> 52) + 1 + bits_of_count - 52;
  return exponent < 1 ? 1 : exponent > 2046 ? 2046 : exponent;
}

COREAI_HD double power_of_two(int exponent_field) {
  const int64_t bits = static_cast<int64_t>(exponent_field) << 52;
  double result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

// 2^52 units: added to a value and taken away again, it rounds it to a multiple of the unit, half to even. For a
// peak that is a float32.
COREAI_HD double rounding_shift(float peak, int bits_of_count) {
  return power_of_two(unit_exponent(peak, bits_of_count) + 52);
}

}  // namespace coreai
