// The product of a weight and its mask.
#pragma once

#include "cpu/loops.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

template <class T>
void apply_mask_range(const T* x, const T* mask, T* out, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) Simd::store(out + i, Simd::mul(Simd::load(x + i), Simd::load(mask + i)));
  if (i < n) {
    const int some = static_cast<int>(n - i);
    Simd::store_n(out + i, Simd::mul(Simd::load_n(x + i, some), Simd::load_n(mask + i, some)), some);
  }
}

void apply_mask_range(const double* x, const double* mask, double* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * mask[i];
}

template <class T>
void apply_mask_shared(const void* x, const void* mask, void* out, int64_t numel) {
  parallel_for(numel, kAlignment, kParallelElements, [&](int64_t begin, int64_t end) {
    apply_mask_range(static_cast<const T*>(x) + begin, static_cast<const T*>(mask) + begin, static_cast<T*>(out) + begin,
                     end - begin);
  });
}

void apply_mask(Element element, const void* x, const void* mask, void* out, int64_t numel) {
  if (element == Element::kFloat64) return apply_mask_shared<double>(x, mask, out, numel);
  with_type(element, [&](auto type) { apply_mask_shared<typename decltype(type)::type>(x, mask, out, numel); });
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
