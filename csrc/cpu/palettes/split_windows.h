// Where the splits of an optimal partition can lie, from bounds on a coarse grid.
#pragma once

#include <cstdint>
#include <vector>

namespace coreai::cpu {

// Prefix sums over the points in ascending order, of the values less their mean: as many as points, and one.
struct PrefixSums {
  std::vector<double> values, masses, squares;
};

// The first and the last possible end of a run.
struct Window {
  int64_t low, high;
};

// For runs 1 to clusters - 1 of the points, a window that has their ends in every partition whose squared error is
// the least, or greater by rounding.
std::vector<Window> split_windows(const PrefixSums& sums, int64_t clusters);

}  // namespace coreai::cpu
