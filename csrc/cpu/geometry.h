// Blocks of a dense tensor as loops over its memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace coreai::cpu {

using std::size_t;

// Shapes, strides and orders on the stack: an operator call is a matter of microseconds.
class Ints {
 public:
  static constexpr size_t kMax = 64;  // torch's own limit on dimensions
  Ints() = default;
  explicit Ints(size_t size, int64_t value = 0) : size_(size) {
    for (size_t i = 0; i < size; ++i) values_[i] = value;
  }
  Ints(const int64_t* begin, const int64_t* end) : size_(static_cast<size_t>(end - begin)) {
    for (size_t i = 0; i < size_; ++i) values_[i] = begin[i];
  }
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  int64_t* begin() { return values_; }
  int64_t* end() { return values_ + size_; }
  const int64_t* begin() const { return values_; }
  const int64_t* end() const { return values_ + size_; }
  const int64_t* data() const { return values_; }
  int64_t& operator[](size_t i) { return values_[i]; }
  int64_t operator[](size_t i) const { return values_[i]; }

 private:
  size_t size_ = 0;
  int64_t values_[kMax];
};

struct Layout {
  Geometry geometry;
  // Row-major block index of the i-th block in memory order; empty where the two orders agree.
  std::vector<int64_t> block_index;
};

// `order`: the axes from the outermost in memory to the innermost.
// Throws std::invalid_argument if there is not one block extent per axis, if one does not divide its axis, or if
// there are too many axes with blocks.
Layout make_layout(const Ints& shape, const Ints& order, const std::vector<int64_t>& block);

}  // namespace coreai::cpu
