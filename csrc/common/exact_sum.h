// Sums of magnitudes that no order of additions changes: before they are added, the magnitudes are rounded to a unit
// that depends on the largest of them alone, and their counts of units are integers (Demmel and Nguyen, Fast
// Reproducible Floating-Point Summation, ARITH 2013).
#pragma once

#include "common/element.h"

namespace coreai {

// Magnitudes are less than 2^28 units: the largest is at least 2^24 of them, so that none is rounded more coarsely
// than float32 rounds the largest. Steps of four binades make most blocks of a tensor share a unit.
constexpr int kUnitBits = 28, kUnitStep = 4;

// Exponent field of the unit, for the exponent field of the largest magnitude; both as in float64.
COREAI_HD int unit_exponent(int exponent) {
  const int unit = ((exponent + 1) & -kUnitStep) + (kUnitStep - 1) - kUnitBits;
  return unit < 1 ? 1 : unit;
}

COREAI_HD double power_of_two(int exponent_field) {
  const int64_t bits = static_cast<int64_t>(exponent_field) << 52;
  double result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

COREAI_HD double unit_for(double peak) {
  int64_t bits;
  __builtin_memcpy(&bits, &peak, sizeof(bits));
  return power_of_two(unit_exponent(static_cast<int>(bits >> 52)));
}

}  // namespace coreai
