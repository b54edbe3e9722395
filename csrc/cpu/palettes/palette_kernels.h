// What the palette operators ask of the CPU kernels of one instruction set.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace coreai::cpu {

struct Geometry;

// A weight in blocks of vectors, and the indices of their centroids. The first of a vector's `dim` entries lies
// as its index does, where rows of `row` indices take `dim` rows of the weight: an entry is `row` after the one before.
struct PaletteLayout {
  const Geometry* geometry;  // of the indices
  int64_t dim, row;
};

// Tables of 16, 32 or 256 entries are handled in different ways. In memory a table has room for 32 or for 256.
enum class TableKind : int { k16, k32, k256 };
constexpr TableKind table_kind(int64_t clusters) {
  return clusters <= 16 ? TableKind::k16 : clusters <= 32 ? TableKind::k32 : TableKind::k256;
}
constexpr int64_t table_room(int64_t clusters) { return clusters <= 32 ? 32 : 256; }

struct Lookup {
  PaletteLayout layout;
  TableKind kind;
  const void* tables;  // words of the output's size: (blocks, dim, room)
  const uint8_t* indices;
  int bits;  // 8: a byte each; else packed
  void* output;
  int64_t element_size;
  const uint8_t* kept = nullptr;  // scalars: what it has a zero for becomes zero; null for none
};

struct Palettize {
  PaletteLayout layout;
  int64_t clusters;
  Element element;
  const void* weight;
  uint8_t* indices;
  // Scalars: the bounds, filled up with infinity, and the index of each interval: (blocks, room).
  // Vectors: the centroids, (blocks, clusters, dim).
  const float* table;
  const int32_t* order;
};

struct SumByIndex {
  PaletteLayout layout;
  int64_t clusters;
  Element element;
  const void* grad;
  const uint8_t* indices;
  int64_t first, last;  // indices to look at
  double* sums;         // added to: (blocks, clusters, dim)
};

// What is computed from the attention a of vectors w over centroids c; `grad` below is one of the outputs'.
enum class SoftStep : int {
  kPalettize,          // output = sum_j a_j c_j
  kPalettizeBackward,  // output = the gradient to w; sums += that to c
  kCentroids,          // sums += a_j w, masses += a_j
  kCentroidsBackward,  // output = the gradient to w; sums += that to c. The gradient to a_j is rate_j w - offset_j.
};

struct Soft {
  PaletteLayout layout;
  int64_t clusters;
  Element element;
  float sharpness;  // 1 / temperature
  const void* weight;
  const float* centroids;  // (blocks, clusters, dim)
  const void* grad;        // like the weight
  const float* rates;      // (blocks, clusters, dim)
  const float* offsets;    // (blocks, clusters)
  void* output;            // like the weight
  double* sums;            // (blocks, clusters, dim)
  double* masses;          // (blocks, clusters)
  float* scratch;          // soft_scratch() of them
  int64_t first, last;     // indices to look at
};

constexpr int64_t kMaxLanes = 16;
constexpr int64_t soft_scratch(int64_t clusters, int64_t dim) {
  return kMaxLanes * (3 * dim + 2 * clusters + clusters * dim);
}

struct PaletteKernels {
  // The first m in [low, high] with the greatest gain[m] + (sum - sums[m])^2 / (mass - masses[m]), and that gain.
  int64_t (*best_split)(const double* gain, const double* sums, const double* masses, double sum, double mass, int64_t low,
                        int64_t high, double* best);
  void (*lookup)(const Lookup&);
  void (*palettize)(const Palettize&);
  void (*soft)(SoftStep, const Soft&);
  void (*sum_by_index)(const SumByIndex&);
};

}  // namespace coreai::cpu
