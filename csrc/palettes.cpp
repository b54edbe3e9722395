// Registration of the palette operators' CPU kernels.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <memory>

#include "cpu/kmeans_1d.h"
#include "tensors.h"

namespace coreai {
namespace {

// Copies blocks of a strided tensor, in row-major order of a block's elements.
class BlockReader {
 public:
  BlockReader(const Tensor& x, const Blocks& block)
      : data_(static_cast<const char*>(x.const_data_ptr())), bytes_(static_cast<int64_t>(x.element_size())) {
    const Ints shape = to_ints(x.sizes()), strides = to_ints(x.strides());
    for (size_t i = 0; i < shape.size(); ++i) {
      const int64_t grid = shape[i] / block[i];
      blocks_ *= grid;
      count_ *= block[i];
      grid_.push_back({grid, strides[i] * block[i] * bytes_});
      // An axis that goes on where the next one ends is part of it.
      if (!inner_.empty() && inner_.back().stride == strides[i] * bytes_ * block[i]) {
        inner_.back() = {inner_.back().size * block[i], strides[i] * bytes_};
      } else if (block[i] != 1) {
        inner_.push_back({block[i], strides[i] * bytes_});
      }
    }
  }
  int64_t blocks() const { return blocks_; }
  int64_t count() const { return count_; }

  // A block's elements in sequence: its own memory where they are so there, else a copy in `buffer`.
  const void* read(int64_t block, std::vector<char>& buffer) const {
    const char* source = data_;
    for (size_t i = grid_.size(); i-- > 0; block /= grid_[i].size) source += block % grid_[i].size * grid_[i].stride;
    if (inner_.empty() || (inner_.size() == 1 && inner_[0].stride == bytes_)) return source;
    buffer.resize(static_cast<size_t>(count_ * bytes_));
    char* out = buffer.data();
    copy(source, 0, out);
    return buffer.data();
  }

 private:
  struct Axis {
    int64_t size, stride;  // in bytes
  };
  void copy(const char* source, size_t axis, char*& out) const {
    const Axis& here = inner_[axis];
    if (axis + 1 < inner_.size()) {
      for (int64_t i = 0; i < here.size; ++i) copy(source + i * here.stride, axis + 1, out);
      return;
    }
    if (here.stride == bytes_) {
      std::copy(source, source + here.size * bytes_, out);
      out += here.size * bytes_;
      return;
    }
    for (int64_t i = 0; i < here.size; ++i, out += bytes_) std::copy_n(source + i * here.stride, bytes_, out);
  }

  const char* data_;
  int64_t bytes_, blocks_ = 1, count_ = 1;
  std::vector<Axis> grid_, inner_;
};

Tensor kmeans_1d(Tensor weight, Optional weights, Blocks block_size, int64_t clusters, std::optional<int64_t> decimals) {
  if (is_double(weight)) weight = to_float(weight);
  if (weights && weights->scalar_type() != ScalarType::Float) weights = to_float(*weights);
  const BlockReader values(weight, block_size);
  std::optional<BlockReader> masses;
  if (weights) masses.emplace(*weights, block_size);
  const int64_t sizes[] = {values.blocks(), clusters, 1};
  const Tensor centroids = empty(Ints(sizes, sizes + 3), ScalarType::Float);
  auto* out = static_cast<float*>(centroids.mutable_data_ptr());
  const cpu::Samples all = {element_of("weight", weight), nullptr, nullptr, values.count(), decimals.has_value(),
                            static_cast<float>(std::pow(10.0, static_cast<double>(decimals.value_or(0))))};
  torch::stable::parallel_for(0, values.blocks(), 1, [&](int64_t begin, int64_t end) {
    std::vector<char> value_buffer, weight_buffer;
    cpu::Points points;
    for (int64_t block = begin; block < end; ++block) {
      cpu::Samples samples = all;
      samples.values = values.read(block, value_buffer);
      if (masses) samples.weights = static_cast<const float*>(masses->read(block, weight_buffer));
      float* here = out + block * clusters;
      if (samples.count > 0 && cpu::distinct_points(samples, points)) {
        cpu::best_centroids(points, static_cast<int>(clusters), here);
      } else {
        std::fill_n(here, clusters, std::numeric_limits<float>::quiet_NaN());
      }
    }
  });
  return centroids;
}

STABLE_TORCH_LIBRARY_IMPL(coreai_kernels, CPU, library) { library.impl("kmeans_1d", TORCH_BOX(&kmeans_1d)); }

}  // namespace
}  // namespace coreai
