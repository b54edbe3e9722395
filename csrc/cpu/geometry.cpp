#include "cpu/geometry.h"

#include <stdexcept>
#include <string>

namespace coreai::cpu {
namespace {

// Alternating (blocks, block) extents, neighbours of one kind merged.
class Axes {
 public:
  struct Axis {
    bool is_block;
    int64_t size;
  };
  void append(bool is_block, int64_t size) {
    if (size == 1) return;
    if (count_ > 0 && axes_[count_ - 1].is_block == is_block) {
      axes_[count_ - 1].size *= size;
    } else {
      axes_[count_++] = {is_block, size};
    }
  }
  int64_t take_last(bool is_block) {
    if (count_ == 0 || axes_[count_ - 1].is_block != is_block) return 1;
    return axes_[--count_].size;
  }
  int count() const { return count_; }
  const Axis& operator[](int i) const { return axes_[i]; }

 private:
  Axis axes_[2 * Ints::kMax];
  int count_ = 0;
};

// Row-major index of each block, listed in memory order.
std::vector<int64_t> index_blocks(const Ints& grid, const Ints& order, int64_t blocks) {
  Ints strides(grid.size(), 1);
  for (size_t i = grid.size(); i-- > 1;) strides[i - 1] = strides[i] * grid[i];
  std::vector<int64_t> index(static_cast<size_t>(blocks));
  bool same = true;
  for (int64_t i = 0; i < blocks; ++i) {
    int64_t rest = i, flat = 0;
    for (size_t j = order.size(); j-- > 0;) {
      const auto axis = static_cast<size_t>(order[j]);
      flat += rest % grid[axis] * strides[axis];
      rest /= grid[axis];
    }
    index[static_cast<size_t>(i)] = flat;
    same = same && flat == i;
  }
  if (same) index.clear();
  return index;
}

}  // namespace

Layout make_layout(const Ints& shape, const Ints& order, const std::vector<int64_t>& block) {
  if (block.size() != shape.size()) {
    throw std::invalid_argument("block_size must have one entry per dimension, that is " + std::to_string(shape.size()) +
                                "; it has " + std::to_string(block.size()));
  }
  Layout layout;
  Geometry& g = layout.geometry;
  Axes axes;
  Ints grid(shape.size());
  int grid_axes = 0;
  bool in_order = true;
  for (size_t position = 0; position < order.size(); ++position) {
    const auto i = static_cast<size_t>(order[position]);
    if (block[i] < 1 || shape[i] % block[i] != 0) {
      throw std::invalid_argument("block_size " + std::to_string(block[i]) + " does not divide axis " + std::to_string(i) +
                                  " of size " + std::to_string(shape[i]));
    }
    grid[i] = shape[i] / block[i];
    grid_axes += grid[i] > 1;
    in_order = in_order && i == position;
    g.numel *= shape[i];
    g.blocks *= grid[i];
    axes.append(false, grid[i]);
    axes.append(true, block[i]);
  }
  if (g.numel == 0) return layout;
  if (!in_order && grid_axes > 1) layout.block_index = index_blocks(grid, order, g.blocks);

  g.run = axes.take_last(true);
  g.columns = axes.take_last(false);
  if (axes.count() > Geometry::kMaxOuter) throw std::invalid_argument("too many axes with blocks");
  g.outer_axes = axes.count();
  int64_t stride = g.columns;
  for (int i = axes.count(); i-- > 0;) {
    g.outer[i] = {axes[i].size, axes[i].is_block ? 0 : stride};
    if (!axes[i].is_block) stride *= axes[i].size;
  }
  return layout;
}

}  // namespace coreai::cpu
