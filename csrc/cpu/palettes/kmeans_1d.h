// Exact k-means of scalars. See kernels/coreai_kernels/reference/kmeans_1d.py for the definition.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/types.h"

namespace coreai::cpu {

// Distinct values in ascending order, each with its mass.
struct Points {
  std::vector<double> values, masses;
  void clear() { values.clear(), masses.clear(); }
  void reserve(std::size_t count) { values.reserve(count), masses.reserve(count); }
  // A value no less than the last one. Equal ones meet.
  void add(double value, double mass) {
    if (!values.empty() && values.back() == value) {
      masses.back() += mass;
      return;
    }
    values.push_back(value);
    masses.push_back(mass);
  }
};

// The elements of a block, one after the other.
struct Samples {
  Element element;  // no float64
  const void* values;
  const float* weights;  // null: all 1
  const uint8_t* kept;   // null: all; else which of them count. Not together with weights.
  int64_t count;
  bool rounds;  // to multiples of 1 / power
  float power;
};

// False if a value or a weight is not finite or a weight is negative.
bool distinct_points(const Samples& samples, Points& points);

// `clusters` centroids, ascending. Needs at least one point.
void best_centroids(const Points& points, int clusters, float* centroids);

}  // namespace coreai::cpu
