// Codes shared with kernels/coreai_kernels/types.py; those of the formats come from the table in formats.py.
#pragma once

#include <cstdint>

#include "common/formats.h"  // made by setup.py

namespace coreai {

enum class Scheme : int { kSymmetric = 0, kSymmetricWithClipping = 1, kAsymmetric = 2 };
enum class RangeUpdate : int { kLatest = 0, kMovingAverage = 1, kGlobalMinMax = 2 };

// Element types of inputs and outputs. kFloat64 is read and written only: arithmetic is in float32.
enum class Element : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// 16-bit storage types without arithmetic.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace coreai
