// From ranges to parameters, kWidth blocks at a time. The formulas are those of reference/qparams.py.
#pragma once

#include "cpu/loops.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

struct Range {
  F low, high;
};

struct QParamsLanes {
  F scale;
  I zero_point;
  F minval;
};

// min and max return their second operand when unordered; adding +0.0 turns -0.0 into it.
template <class = void>
COREAI_HD F at_most_zero(F x) {
  return Simd::add(Simd::min(Simd::set(0.0f), x), Simd::set(0.0f));
}
template <class = void>
COREAI_HD F at_least_zero(F x) {
  return Simd::add(Simd::max(Simd::set(0.0f), x), Simd::set(0.0f));
}
template <class = void>
COREAI_HD F nan_min(F a, F b) {
  return Simd::select(Simd::unordered(a, a), a, Simd::min(a, b));
}
template <class = void>
COREAI_HD F nan_max(F a, F b) {
  return Simd::select(Simd::unordered(a, a), a, Simd::max(a, b));
}

template <class T>
COREAI_HD F load_lanes_of(const void* from, int64_t at, int n) {
  const T* p = static_cast<const T*>(from) + at;
  return n == kWidth ? Simd::load(p) : Simd::load_n(p, n);
}

template <class T>
COREAI_HD void store_lanes_of(void* to, int64_t at, F values, int n) {
  T* p = static_cast<T*>(to) + at;
  n == kWidth ? Simd::store(p, values) : Simd::store_n(p, values, n);
}

// Not by with_type, which is a call: parameters of blocks are few elements' work.
template <class = void>
COREAI_HD F load_elements(Element element, const void* from, int64_t at, int n) {
  if (element == Element::kBFloat16) return load_lanes_of<BFloat16>(from, at, n);
  if (element == Element::kFloat16) return load_lanes_of<Float16>(from, at, n);
  return load_lanes_of<float>(from, at, n);
}

template <class = void>
COREAI_HD void store_elements(Element element, void* to, int64_t at, F values, int n) {
  if (element == Element::kBFloat16) return store_lanes_of<BFloat16>(to, at, values, n);
  if (element == Element::kFloat16) return store_lanes_of<Float16>(to, at, values, n);
  store_lanes_of<float>(to, at, values, n);
}

// Whether the range before a batch counts.
inline bool reads_running(const UpdateRule& rule) { return rule.update != RangeUpdate::kLatest && rule.has_running; }

// The running range after a batch whose range is `batch`; before it was `old`, if that counts.
template <class = void>
COREAI_HD Range update_lanes(const UpdateRule& rule, Element element, Range batch, Range old) {
  Range range = {at_most_zero(batch.low), at_least_zero(batch.high)};
  if (rule.fix_low) range.low = Simd::set(rule.low);
  if (rule.fix_high) range.high = Simd::set(rule.high);
  if (!reads_running(rule)) return range;
  if (rule.update == RangeUpdate::kGlobalMinMax) {
    return {nan_min(range.low, old.low), nan_max(range.high, old.high)};
  }
  const auto average = [&](F now, F before) {
    const F new_part = round_to_element<Simd>(Simd::mul(now, Simd::set(rule.constant)), element);
    const F old_part = round_to_element<Simd>(Simd::mul(before, Simd::set(rule.one_minus_constant)), element);
    return round_to_element<Simd>(Simd::add(new_part, old_part), element);
  };
  return {average(range.low, old.low), average(range.high, old.high)};
}

template <class = void>
COREAI_HD F power_of_two_scale(F amax, int largest_exponent) {
  const I exponent = Simd::iand(Simd::template shr<23>(Simd::as_int(amax)), Simd::iset(0xff));
  const I biased =
      Simd::imin(Simd::iset(255), Simd::imax(Simd::iset(0), Simd::iadd(exponent, Simd::iset(-largest_exponent))));
  return Simd::max(Simd::set(ScaleFacts<ScaleFormat::kE8M0>::kSmallest), Simd::as_float(Simd::template shl<23>(biased)));
}

template <class = void>
COREAI_HD F largest_magnitude(Range range) {
  const F below = Simd::sub(Simd::set(-0.0f), at_most_zero(range.low));
  return Simd::add(nan_max(below, at_least_zero(range.high)), Simd::set(0.0f));
}

// What the blocks with ranges from `low` to `high` share, if scales have two levels.
inline float tensor_scale(const QParamsRule& rule, const float* low, const float* high, int64_t blocks) {
  if (rule.scale_format != ScaleFormat::kE4M3) return 0.0f;
  F lanes = Simd::set(0.0f);
  for (int64_t i = 0; i < blocks; i += kWidth) {
    const int n = static_cast<int>(min<int64_t>(kWidth, blocks - i));
    lanes = nan_max(lanes, largest_magnitude({Simd::load_n(low + i, n), Simd::load_n(high + i, n)}));
  }
  alignas(64) float values[kWidth];
  Simd::store(values, lanes);
  float largest = 0.0f;
  for (const float value : values) largest = value > largest || value != value ? value : largest;
  const float scale = largest / (FormatFacts<Format::kE4M3>::kMax * static_cast<float>(rule.quant_max));
  constexpr float kSmallest = ScaleFacts<ScaleFormat::kE4M3>::kSmallestOfTensor;
  return scale < kSmallest ? kSmallest : scale;
}

// Not by products with reciprocals: rounding to e4m3 may change between any two quotients.
template <class = void>
COREAI_HD F two_level_scale(const QParamsRule& rule, F amax, float tensor_scale) {
  const F of_block = Simd::div(Simd::div(amax, Simd::set(static_cast<float>(rule.quant_max))), Simd::set(tensor_scale));
  const F smallest = Simd::set(ScaleFacts<ScaleFormat::kE4M3>::kSmallest);
  const F largest = Simd::set(FormatFacts<Format::kE4M3>::kMax);
  const F rounded = round_to_format<Simd, Format::kE4M3>(clamp_lanes<Simd>(of_block, smallest, largest));
  return Simd::mul(rounded, Simd::set(tensor_scale));
}

// Quotients rounded to `rounding`, of which no more than 2^-23 counts. Rounding to bfloat16 changes at numbers of nine
// bits: a corrected product is as good as the quotient, see Simd::quotient.
template <class S>
COREAI_HD typename S::F rounded_quotient(typename S::F x, float divisor, Element rounding) {
  if constexpr (S::kHasQuotient) {
    if (rounding == Element::kBFloat16 && divisor >= 0.5f && divisor <= 0x1p16f) {
      return round_to_element<S>(S::quotient(x, S::set(divisor), S::set(1.0f / divisor)), rounding);
    }
  }
  return round_to_element<S>(S::div(x, S::set(divisor)), rounding);
}

template <class = void>
COREAI_HD QParamsLanes choose_lanes(const QParamsRule& rule, Range range, float tensor_scale = 0.0f) {
  const auto rounded = [&](F x) { return round_to_element<Simd>(x, rule.rounding); };
  const F low = at_most_zero(range.low), high = at_least_zero(range.high);
  const F amax = largest_magnitude(range);
  const F smallest = Simd::set(ScaleFacts<ScaleFormat::kFloat32>::kSmallest);
  const double width = rule.quant_max - rule.quant_min;
  if (rule.scale_format == ScaleFormat::kE8M0) {
    const F scale = power_of_two_scale(amax, largest_exponent(rule.format, rule.quant_max));
    const F minval = rule.format == Format::kInt ? Simd::sub(Simd::set(-0.0f), amax) : Simd::set(0.0f);
    return {scale, Simd::iset(0), minval};
  }
  if (rule.scale_format == ScaleFormat::kE4M3) {
    return {two_level_scale(rule, amax, tensor_scale), Simd::iset(0), Simd::set(0.0f)};
  }
  if (rule.format != Format::kInt) {
    const F scale = rounded_quotient<Simd>(amax, static_cast<float>(rule.quant_max), rule.rounding);
    return {Simd::max(smallest, scale), Simd::iset(0), Simd::set(0.0f)};
  }
  if (rule.scheme == Scheme::kAsymmetric) {
    const F extent = rounded(Simd::sub(high, low));
    const F scale = Simd::max(smallest, rounded_quotient<Simd>(extent, static_cast<float>(width), rule.rounding));
    const F quant_min = Simd::set(static_cast<float>(rule.quant_min));
    const F quant_max = Simd::set(static_cast<float>(rule.quant_max));
    const F zero_point = rounded(Simd::sub(quant_min, Simd::round(rounded(Simd::div(low, scale)))));
    const F clamped = Simd::min(quant_max, Simd::max(quant_min, zero_point));
    return {scale, Simd::truncate(clamped), low};
  }
  const F scale = rounded_quotient<Simd>(amax, static_cast<float>(width / 2), rule.rounding);
  const double middle = rule.quant_min + rule.quant_max + 1;
  const int32_t zero_point = static_cast<int32_t>(__builtin_floor(middle / 2));
  return {Simd::max(smallest, scale), Simd::iset(zero_point), Simd::sub(Simd::set(-0.0f), amax)};
}

template <class = void>
COREAI_HD void store_qparams(const QParamsLanes& lanes, const QParams& out, int64_t block, int n) {
  Simd::store_n(out.scale + block, lanes.scale, n);
  if (out.zero_point) Simd::store_n(out.zero_point + block, lanes.zero_point, n);
  if (out.minval) Simd::store_n(out.minval + block, lanes.minval, n);
}

void choose_qparams(const QParamsRule& rule, const float* low, const float* high, int64_t blocks, const QParams& out) {
  const float of_tensor = tensor_scale(rule, low, high, blocks);
  parallel_for(blocks, kWidth, kParallelElements / 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kWidth) {
      const int n = static_cast<int>(min<int64_t>(kWidth, end - i));
      const Range range = {Simd::load_n(low + i, n), Simd::load_n(high + i, n)};
      store_qparams(choose_lanes(rule, range, of_tensor), out, i, n);
    }
  });
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
