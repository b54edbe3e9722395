#include "cpu/palettes/split_windows.h"

#include <algorithm>
#include <cstddef>
#include <limits>

#include "cpu/kernels.h"

namespace coreai::cpu {
namespace {

using std::size_t;

// Cells of the grid, and for each cluster: the more, the narrower the windows, and the more the grid itself costs.
constexpr int64_t kCells = 4096, kCellsPerCluster = 64;
// Partitions whose errors differ by this share of the variance are told apart, whatever the rounding.
constexpr double kMargin = 1e-9;

using Costs = std::vector<double>;

// Some of the prefix sums, from the front or from the back.
struct Grid {
  Costs values, masses, squares;

  Grid(const PrefixSums& sums, const std::vector<int64_t>& positions, bool reversed) {
    for (size_t i = 0; i < positions.size(); ++i) {
      const auto position = static_cast<size_t>(positions[reversed ? positions.size() - 1 - i : i]);
      add(values, sums.values, position, reversed);
      add(masses, sums.masses, position, reversed);
      add(squares, sums.squares, position, reversed);
    }
  }

  // The squared error of the points before each position as one run.
  Costs of_one_run() const {
    Costs costs(values.size());
    for (size_t i = 1; i < costs.size(); ++i) costs[i] = squares[i] - values[i] * values[i] / masses[i];
    return costs;
  }

 private:
  static void add(Costs& to, const std::vector<double>& from, size_t position, bool reversed) {
    to.push_back(reversed ? from.back() - from[position] : from[position]);
  }
};

// Least errors of one run more, where a run may begin at each position m after the runs that cost before[m].
// `may_be_empty`: it may also begin and end at the same position.
Costs add_run(const Grid& grid, const Costs& before, int64_t first, bool may_be_empty) {
  const auto last = static_cast<int64_t>(before.size()) - 1;
  Costs gain(before.size()), after(before.size(), std::numeric_limits<double>::infinity());
  for (size_t m = 0; m < gain.size(); ++m) gain[m] = grid.squares[m] - before[m];
  const auto best_split = kernels().palettes.best_split;
  struct Range {
    int64_t low, high, least, most;
  };
  std::vector<Range> open = {{first + (may_be_empty ? 0 : 1), last, first, last}};
  while (!open.empty()) {
    const Range range = open.back();
    open.pop_back();
    if (range.low > range.high) continue;
    const int64_t middle = (range.low + range.high) / 2;
    const auto i = static_cast<size_t>(middle);
    double most = -std::numeric_limits<double>::infinity();
    int64_t split = middle;
    if (range.least < middle) {
      split = best_split(gain.data(), grid.values.data(), grid.masses.data(), grid.values[i], grid.masses[i], range.least,
                         std::min(range.most, middle - 1), &most);
    }
    if (may_be_empty && range.most >= middle && gain[i] > most) most = gain[i], split = middle;
    after[i] = grid.squares[i] - most;
    open.push_back({middle + 1, range.high, split, range.most});
    open.push_back({range.low, middle - 1, range.least, split});
  }
  return after;
}

// Lower bounds for the first points up to each position, in 1 to `most` runs. A split anywhere in a cell leaves no less
// error before than the cell's begin, and none less after than its end.
std::vector<Costs> lower_bounds(const Grid& grid, int64_t most) {
  std::vector<Costs> bounds = {grid.of_one_run()};
  while (static_cast<int64_t>(bounds.size()) < most) {
    Costs shifted = bounds.back();
    std::rotate(shifted.begin(), shifted.end() - 1, shifted.end());
    shifted[0] = std::numeric_limits<double>::infinity();
    Costs next = add_run(grid, shifted, 1, true);
    next[0] = 0;
    bounds.push_back(std::move(next));
  }
  return bounds;
}

// The error of the best partition with splits at positions of the grid.
double upper_bound(const Grid& grid, int64_t clusters) {
  Costs costs = grid.of_one_run();
  costs[0] = std::numeric_limits<double>::infinity();
  for (int64_t runs = 2; runs <= clusters; ++runs) costs = add_run(grid, costs, runs - 1, false);
  return costs.back();
}

}  // namespace

std::vector<Window> split_windows(const PrefixSums& sums, int64_t clusters) {
  const auto count = static_cast<int64_t>(sums.values.size()) - 1;
  std::vector<int64_t> positions;
  const int64_t cells = std::min(std::max(kCells, kCellsPerCluster * clusters), count);
  for (int64_t i = 0; i <= cells; ++i) positions.push_back(count * i / cells);
  const Grid forward(sums, positions, false), backward(sums, positions, true);
  const double limit = upper_bound(forward, clusters) + kMargin * sums.squares.back();
  const std::vector<Costs> before = lower_bounds(forward, clusters - 1), after = lower_bounds(backward, clusters - 1);
  std::vector<Window> windows;
  for (int64_t runs = 1; runs < clusters; ++runs) {
    const Costs& left = before[static_cast<size_t>(runs - 1)];
    const Costs& right = after[static_cast<size_t>(clusters - runs - 1)];
    const auto possible = [&](int64_t cell) {
      return left[static_cast<size_t>(cell)] + right[static_cast<size_t>(cells - cell - 1)] <= limit;
    };
    int64_t low = 0, high = cells - 1;
    while (low < high && !possible(low)) ++low;
    while (high > low && !possible(high)) --high;
    // A run ends after the one before it.
    const int64_t least = windows.empty() ? 1 : windows.back().low + 1;
    windows.push_back({std::max(positions[static_cast<size_t>(low)], least),
                       std::min(positions[static_cast<size_t>(high + 1)], count - (clusters - runs))});
  }
  return windows;
}

}  // namespace coreai::cpu
