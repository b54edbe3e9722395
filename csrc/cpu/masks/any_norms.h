// L1 norms of any blocks of any type, one element after the other.
#pragma once

#include "common/exact_sum.h"
#include "cpu/loops.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

// body(block, magnitude) for all elements.
template <class T, class Body>
void over_magnitudes(const Geometry& g, const T* x, Body body) {
  for (int64_t row = 0; row < g.numel / row_length(g); ++row) {
    const int64_t base = row_base(g, row);
    for (int64_t i = 0; i < row_length(g);) {
      const int some = static_cast<int>(min<int64_t>(kWidth, row_length(g) - i));
      if constexpr (__is_same(T, double)) {
        for (int lane = 0; lane < some; ++lane, ++i, ++x) body(base + i / g.run, __builtin_fabs(*x));
      } else {
        float values[kWidth];
        Simd::store(values, Simd::load_n(x, some));
        for (int lane = 0; lane < some; ++lane, ++i, ++x) body(base + i / g.run, __builtin_fabs(values[lane]));
      }
    }
  }
}

template <class T>
void any_norms(const Geometry& g, const T* x, double* norms) {
  for (int64_t i = 0; i < g.blocks; ++i) norms[i] = 0.0;
  over_magnitudes(g, x, [&](int64_t block, double magnitude) {
    const double peak = norms[block];
    if (magnitude > peak || magnitude != magnitude) norms[block] = peak != peak ? peak : magnitude;
  });
  int64_t* counts = new int64_t[static_cast<uint64_t>(g.blocks)]();
  over_magnitudes(g, x, [&](int64_t block, double magnitude) {
    if (norms[block] < __builtin_inf()) {
      counts[block] += static_cast<int64_t>(__builtin_rint(magnitude / unit_for(norms[block])));
    }
  });
  // Of a block with an infinity or a NaN nothing else counts.
  for (int64_t i = 0; i < g.blocks; ++i) {
    if (norms[i] < __builtin_inf()) norms[i] = static_cast<double>(counts[i]) * unit_for(norms[i]);
  }
  delete[] counts;
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
