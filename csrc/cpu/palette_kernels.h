// What the palette operators ask of the CPU kernels of one instruction set.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace coreai::cpu {

struct PaletteKernels {
  // The first m in [low, high] with the greatest gain[m] + (sum - sums[m])^2 / (mass - masses[m]), and that gain.
  int64_t (*best_split)(const double* gain, const double* sums, const double* masses, double sum, double mass,
                        int64_t low, int64_t high, double* best);
};

}  // namespace coreai::cpu
