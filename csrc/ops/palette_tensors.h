// Palettes and the layout of palettized weights, as the kernels take them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "ops/tensors.h"

namespace coreai {
namespace {

inline Blocks index_blocks(Blocks block_size, int64_t dim) {
  if (!block_size.empty()) block_size[0] /= dim;
  return block_size;
}

// A weight's shape from that of its indices, or back.
inline Ints rows_times(Ints shape, int64_t dim) {
  if (!shape.empty()) shape[0] *= dim;
  return shape;
}

inline Ints rows_over(Ints shape, int64_t dim) {
  if (!shape.empty()) shape[0] /= dim;
  return shape;
}

inline int64_t row_size(const Ints& shape) {
  int64_t size = 1;
  for (size_t i = 1; i < shape.size(); ++i) size *= shape[i];
  return std::max<int64_t>(1, size);
}

// Palettes of each block, in the order in which blocks come in memory.
class Palettes {
 public:
  Palettes(const Tensor& centroids, const cpu::Layout& layout)
      : tensor_(torch::stable::contiguous(centroids)),
        index_(layout.block_index),
        blocks_(layout.geometry.blocks),
        clusters_(centroids.size(1)),
        dim_(centroids.size(2)) {
    STD_TORCH_CHECK(centroids.size(0) == blocks_, "centroids must have one palette per block, that is ", blocks_,
                    "; they have ", centroids.size(0));
    STD_TORCH_CHECK(clusters_ >= 1 && clusters_ <= 256, "centroids must be 1 to 256 a block");
  }
  int64_t clusters() const { return clusters_; }
  int64_t dim() const { return dim_; }

  // Words of the centroids' type as (blocks, dim, room), for lookup.
  template <class Word>
  std::vector<char> tables() const {
    const auto* from = static_cast<const Word*>(tensor_.const_data_ptr());
    const int64_t room = cpu::table_room(clusters_);
    std::vector<char> bytes(static_cast<size_t>(blocks_ * dim_ * room) * sizeof(Word));
    auto* to = reinterpret_cast<Word*>(bytes.data());
    for (int64_t i = 0; i < blocks_; ++i) {
      const Word* palette = from + source(i) * clusters_ * dim_;
      for (int64_t j = 0; j < clusters_; ++j) {
        for (int64_t entry = 0; entry < dim_; ++entry) to[(i * dim_ + entry) * room + j] = palette[j * dim_ + entry];
      }
    }
    return bytes;
  }

  // float32 as (blocks, clusters, dim).
  std::vector<float> values() const {
    const Tensor floats = as_float32(tensor_);
    const auto* from = static_cast<const float*>(floats.const_data_ptr());
    const int64_t size = clusters_ * dim_;
    std::vector<float> result(static_cast<size_t>(blocks_ * size));
    for (int64_t i = 0; i < blocks_; ++i) std::copy_n(from + source(i) * size, size, result.data() + i * size);
    return result;
  }

  // Row-major number of a block from its place in memory.
  int64_t source(int64_t block) const { return index_.empty() ? block : index_[static_cast<size_t>(block)]; }

 private:
  Tensor tensor_;
  const std::vector<int64_t>& index_;
  int64_t blocks_, clusters_, dim_;
};

// Where the nearest of some scalars changes: see decision_bounds in kernels/coreai_kernels/reference/palettize.py.
inline void decision_bounds(const float* centroids, int64_t clusters, float* bounds, int32_t* indices) {
  int32_t order[256];
  std::iota(order, order + clusters, 0);
  std::stable_sort(order, order + clusters, [&](int32_t a, int32_t b) {
    return centroids[a] < centroids[b] || (std::isnan(centroids[b]) && !std::isnan(centroids[a]));
  });
  for (int64_t j = 0; j < clusters; ++j) {
    const bool repeats = j > 0 && centroids[order[j]] == centroids[order[j - 1]];
    indices[j] = repeats ? indices[j - 1] : order[j];
  }
  for (int64_t j = 0; j + 1 < clusters; ++j) {
    const double middle = (static_cast<double>(centroids[order[j]]) + static_cast<double>(centroids[order[j + 1]])) / 2;
    float bound = static_cast<float>(middle);
    constexpr float kBelow = -std::numeric_limits<float>::infinity();
    if (bound > middle) bound = std::nextafter(bound, kBelow);
    if (indices[j + 1] < indices[j] && bound == middle) bound = std::nextafter(bound, kBelow);
    bounds[j] = std::isnan(bound) ? std::numeric_limits<float>::infinity() : bound;
  }
}

inline float power_of_ten(int64_t decimals) { return static_cast<float>(std::pow(10.0, static_cast<double>(decimals))); }

// Float32 values in ascending order as whole numbers without a gap, and back.
inline int32_t ordinal(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits < 0 ? std::numeric_limits<int32_t>::min() - bits - 1 : bits;
}

inline float from_ordinal(int32_t number) {
  const int32_t bits = number < 0 ? std::numeric_limits<int32_t>::min() - number - 1 : number;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Instead of each bound the largest value that, rounded to multiples of 1 / power, is not above it: what exceeds the
// one is what exceeds the other once it is rounded, since rounding keeps the order.
inline void bounds_before_rounding(float* bounds, int64_t count, float power) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; ++i) {
    const float bound = bounds[i];
    if (bound == kInfinity) continue;
    const auto is_below = [&](int64_t number) {
      return std::nearbyint(from_ordinal(static_cast<int32_t>(number)) * power) / power <= bound;
    };
    // From half a step above the bound, in growing strides to both sides; then by halving.
    const int64_t lowest = ordinal(-kInfinity), highest = ordinal(kInfinity);
    const float guess = (std::floor(bound * power) + 0.5f) / power;
    int64_t low = std::isnan(guess) ? 0 : ordinal(guess), high = low;
    for (int64_t stride = 1; low > lowest && !is_below(low); stride *= 4) high = low, low = std::max(low - stride, lowest);
    for (int64_t stride = 1; high < highest && is_below(high); stride *= 4)
      low = high, high = std::min(high + stride, highest);
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (is_below(middle) ? low : high) = middle;
    }
    bounds[i] = from_ordinal(static_cast<int32_t>(low));
  }
}

// Elements summed by one part, if not too many blocks ask for sums: so the order of additions does not depend on
// the number of threads.
constexpr int64_t kPart = 1 << 16, kMaxParts = 64, kMaxSums = 1 << 22;

inline int64_t parts_of(int64_t numel, int64_t sums) {
  const int64_t limit = std::clamp<int64_t>(kMaxSums / std::max<int64_t>(1, sums), 1, kMaxParts);
  return std::clamp<int64_t>(numel / kPart, 1, limit);
}

inline std::vector<double> sum_parts(const std::vector<double>& sums, int64_t parts) {
  const size_t size = sums.size() / static_cast<size_t>(parts);
  std::vector<double> totals(sums.begin(), sums.begin() + static_cast<std::ptrdiff_t>(size));
  for (size_t i = size; i < sums.size(); ++i) totals[i % size] += sums[i];
  return totals;
}

}  // namespace
}  // namespace coreai
