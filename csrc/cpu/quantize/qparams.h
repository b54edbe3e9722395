// Ranges and parameters of kWidth blocks at a time: memory and threads around common/qparams.h.
#pragma once

#include "common/qparams.h"
#include "cpu/loops.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

using Range = ValueRange<Simd>;

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

// What the blocks with ranges from `low` to `high` share, if scales have two levels.
inline float tensor_scale(const QParamsRule& rule, const float* low, const float* high, int64_t blocks) {
  if (rule.scale_format != ScaleFormat::kE4M3) return 0.0f;
  F lanes = Simd::set(0.0f);
  for (int64_t i = 0; i < blocks; i += kWidth) {
    const int n = static_cast<int>(min<int64_t>(kWidth, blocks - i));
    lanes = nan_max<Simd>(lanes, largest_magnitude<Simd>({Simd::load_n(low + i, n), Simd::load_n(high + i, n)}));
  }
  alignas(64) float values[kWidth];
  Simd::store(values, lanes);
  float largest = 0.0f;
  for (const float value : values) largest = value > largest || value != value ? value : largest;
  return tensor_scale_of(rule, largest);
}

template <class = void>
COREAI_HD void store_qparams(const QParamsLanes<Simd>& lanes, const QParams& out, int64_t block, int n) {
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
      store_qparams(choose_lanes<Simd>(rule, range, of_tensor), out, i, n);
    }
  });
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
