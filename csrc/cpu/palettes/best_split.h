// The inner loop of kmeans_1d: which split of a prefix gains most.
#pragma once

#include "cpu/palettes/palette_kernels.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

constexpr int kDoubles = kWidth / 2;
typedef double Doubles __attribute__((vector_size(8 * kDoubles)));
typedef int64_t Longs __attribute__((vector_size(8 * kDoubles)));

COREAI_HD Doubles load_doubles(const double* p) {
  Doubles result;
  __builtin_memcpy(&result, p, sizeof(result));
  return result;
}

inline int64_t best_split(const double* gain, const double* sums, const double* masses, double sum, double mass, int64_t low,
                          int64_t high, double* best) {
  double most = -__builtin_inf();
  int64_t chosen = low, m = low;
  if (high - low >= 4 * kDoubles) {
    Doubles top = Doubles{} - __builtin_inf();
    Longs at{}, here;
    for (int i = 0; i < kDoubles; ++i) here[i] = low + i;
    for (; m + kDoubles <= high + 1; m += kDoubles, here += kDoubles) {
      const Doubles run = sum - load_doubles(sums + m);
      const Doubles candidate = load_doubles(gain + m) + run * run / (mass - load_doubles(masses + m));
      const Longs better = candidate > top;
      top = better ? candidate : top;
      at = better ? here : at;
    }
    for (int i = 0; i < kDoubles; ++i) {
      if (top[i] > most || (top[i] == most && at[i] < chosen)) most = top[i], chosen = at[i];
    }
  }
  for (; m <= high; ++m) {
    const double run = sum - sums[m];
    const double candidate = gain[m] + run * run / (mass - masses[m]);
    if (candidate > most) most = candidate, chosen = m;
  }
  *best = most;
  return chosen;
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
