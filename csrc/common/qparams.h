// From ranges to parameters, as many blocks at a time as S has lanes. The formulas are those of reference/qparams.py.
#pragma once

#include "common/element.h"

namespace coreai {

// How a range becomes parameters. `rounding`: the type that every intermediate result is rounded to.
struct QParamsRule {
  Scheme scheme;
  Format format;
  ScaleFormat scale_format;
  Element rounding;
  float quant_min, quant_max;
  float divisor;             // of what scales are in proportion to
  int32_t middle;            // zero point of symmetric integers
  int32_t largest_exponent;  // of a quantized value

  static COREAI_HOST QParamsRule of(Scheme scheme, Format format, double quant_min, double quant_max,
                                    ScaleFormat scale_format, Element rounding) {
    const double width = quant_max - quant_min;
    const bool is_asymmetric = format == Format::kInt && scheme == Scheme::kAsymmetric;
    return {.scheme = scheme,
            .format = format,
            .scale_format = scale_format,
            .rounding = rounding,
            .quant_min = static_cast<float>(quant_min),
            .quant_max = static_cast<float>(quant_max),
            .divisor = static_cast<float>(is_asymmetric ? width : width / 2),
            .middle = static_cast<int32_t>((quant_min + quant_max + 1) / 2),
            .largest_exponent = coreai::largest_exponent(format, quant_max)};
  }
};

struct UpdateRule {
  RangeUpdate update;
  bool has_running;
  float constant, one_minus_constant;
  bool fix_low, fix_high;
  float low, high;  // already rounded to the input's type

  // Whether the range before a batch counts.
  COREAI_HD bool reads_running() const { return update != RangeUpdate::kLatest && has_running; }
};

template <class S>
struct ValueRange {
  typename S::F low, high;
};

template <class S>
struct QParamsLanes {
  typename S::F scale;
  typename S::I zero_point;
  typename S::F minval;
};

// min and max return their second operand when unordered; adding +0.0 turns -0.0 into it.
template <class S>
COREAI_HD typename S::F at_most_zero(typename S::F x) {
  return S::add(S::min(S::set(0.0f), x), S::set(0.0f));
}
template <class S>
COREAI_HD typename S::F at_least_zero(typename S::F x) {
  return S::add(S::max(S::set(0.0f), x), S::set(0.0f));
}
template <class S>
COREAI_HD typename S::F nan_min(typename S::F a, typename S::F b) {
  return S::select(S::unordered(a, a), a, S::min(a, b));
}
template <class S>
COREAI_HD typename S::F nan_max(typename S::F a, typename S::F b) {
  return S::select(S::unordered(a, a), a, S::max(a, b));
}

// The running range after a batch whose range is `batch`; before it was `old`, if that counts.
template <class S>
COREAI_HD ValueRange<S> update_lanes(const UpdateRule& rule, Element element, ValueRange<S> batch, ValueRange<S> old) {
  using F = typename S::F;
  ValueRange<S> range = {at_most_zero<S>(batch.low), at_least_zero<S>(batch.high)};
  if (rule.fix_low) range.low = S::set(rule.low);
  if (rule.fix_high) range.high = S::set(rule.high);
  if (!rule.reads_running()) return range;
  if (rule.update == RangeUpdate::kGlobalMinMax) {
    return {nan_min<S>(range.low, old.low), nan_max<S>(range.high, old.high)};
  }
  const auto average = [&](F now, F before) {
    const F new_part = round_to_element<S>(S::mul(now, S::set(rule.constant)), element);
    const F old_part = round_to_element<S>(S::mul(before, S::set(rule.one_minus_constant)), element);
    return round_to_element<S>(S::add(new_part, old_part), element);
  };
  return {average(range.low, old.low), average(range.high, old.high)};
}

template <class S>
COREAI_HD typename S::F power_of_two_scale(typename S::F amax, int largest_exponent) {
  const auto exponent = S::iand(S::template shr<23>(S::as_int(amax)), S::iset(0xff));
  const auto biased = S::imin(S::iset(255), S::imax(S::iset(0), S::iadd(exponent, S::iset(-largest_exponent))));
  return S::max(S::set(ScaleFacts<ScaleFormat::kE8M0>::kSmallest), S::as_float(S::template shl<23>(biased)));
}

template <class S>
COREAI_HD typename S::F largest_magnitude(ValueRange<S> range) {
  const auto below = S::sub(S::set(-0.0f), at_most_zero<S>(range.low));
  return S::add(nan_max<S>(below, at_least_zero<S>(range.high)), S::set(0.0f));
}

// What blocks share whose scales have two levels, if the largest magnitude of all is that; of other scales not used.
COREAI_HD float tensor_scale_of(const QParamsRule& rule, float largest) {
  if (rule.scale_format != ScaleFormat::kE4M3) return 0.0f;
  const float scale = largest / (FormatFacts<Format::kE4M3>::kMax * rule.quant_max);
  constexpr float kSmallest = ScaleFacts<ScaleFormat::kE4M3>::kSmallestOfTensor;
  return scale < kSmallest ? kSmallest : scale;
}

// Not by products with reciprocals: rounding to e4m3 may change between any two quotients.
template <class S>
COREAI_HD typename S::F two_level_scale(const QParamsRule& rule, typename S::F amax, float tensor_scale) {
  const auto of_block = S::div(S::div(amax, S::set(rule.quant_max)), S::set(tensor_scale));
  const auto smallest = S::set(ScaleFacts<ScaleFormat::kE4M3>::kSmallest);
  const auto largest = S::set(FormatFacts<Format::kE4M3>::kMax);
  const auto rounded = round_to_format<S, Format::kE4M3>(clamp_lanes<S>(of_block, smallest, largest));
  return S::mul(rounded, S::set(tensor_scale));
}

// Quotients rounded to `rounding`, of which no more than 2^-23 counts. Rounding to bfloat16 changes at numbers of nine
// bits: a corrected product is as good as the quotient, see S::quotient.
template <class S>
COREAI_HD typename S::F rounded_quotient(typename S::F x, float divisor, Element rounding) {
  if constexpr (S::kHasQuotient) {
    if (rounding == Element::kBFloat16 && divisor >= 0.5f && divisor <= 0x1p16f) {
      return round_to_element<S>(S::quotient(x, S::set(divisor), S::set(1.0f / divisor)), rounding);
    }
  }
  return round_to_element<S>(S::div(x, S::set(divisor)), rounding);
}

// `kHasTwoLevels`: whether scales may have, for which `tensor_scale` is.
template <class S, bool kHasTwoLevels = true>
COREAI_HD QParamsLanes<S> choose_lanes(const QParamsRule& rule, ValueRange<S> range, float tensor_scale = 0.0f) {
  using F = typename S::F;
  const auto rounded = [&](F x) { return round_to_element<S>(x, rule.rounding); };
  const F low = at_most_zero<S>(range.low), high = at_least_zero<S>(range.high);
  const F amax = largest_magnitude<S>(range);
  const bool is_int = rule.format == Format::kInt, is_asymmetric = is_int && rule.scheme == Scheme::kAsymmetric;
  if (rule.scale_format == ScaleFormat::kE8M0) {
    const F scale = power_of_two_scale<S>(amax, rule.largest_exponent);
    return {scale, S::iset(0), is_int ? S::sub(S::set(-0.0f), amax) : S::set(0.0f)};
  }
  if (kHasTwoLevels && rule.scale_format == ScaleFormat::kE4M3) {
    return {two_level_scale<S>(rule, amax, tensor_scale), S::iset(0), S::set(0.0f)};
  }
  const F extent = is_asymmetric ? rounded(S::sub(high, low)) : amax;
  const F smallest = S::set(ScaleFacts<ScaleFormat::kFloat32>::kSmallest);
  const F scale = S::max(smallest, rounded_quotient<S>(extent, rule.divisor, rule.rounding));
  if (is_asymmetric) {
    const F quant_min = S::set(rule.quant_min);
    const F zero_point = rounded(S::sub(quant_min, S::round(rounded(S::div(low, scale)))));
    const F clamped = S::min(S::set(rule.quant_max), S::max(quant_min, zero_point));
    return {scale, S::truncate(clamped), low};
  }
  return {scale, S::iset(is_int ? rule.middle : 0), is_int ? S::sub(S::set(-0.0f), amax) : S::set(0.0f)};
}

}  // namespace coreai
