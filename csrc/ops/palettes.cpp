// Registration of the palette operators' CPU kernels.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/palettes/kmeans_1d.h"
#include "ops/palette_tensors.h"

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
  const bool chooses = weights && weights->scalar_type() == ScalarType::Bool;
  if (weights && !chooses && weights->scalar_type() != ScalarType::Float) weights = to_float(*weights);
  const BlockReader values(weight, block_size);
  std::optional<BlockReader> masses;
  if (weights) masses.emplace(*weights, block_size);
  const int64_t sizes[] = {values.blocks(), clusters, 1};
  const Tensor centroids = empty(Ints(sizes, sizes + 3), ScalarType::Float);
  auto* out = static_cast<float*>(centroids.mutable_data_ptr());
  const cpu::Samples all = {
      element_of("weight", weight),      nullptr, nullptr, nullptr, values.count(), decimals.has_value(),
      power_of_ten(decimals.value_or(0))};
  torch::stable::parallel_for(0, values.blocks(), 1, [&](int64_t begin, int64_t end) {
    std::vector<char> value_buffer, weight_buffer;
    cpu::Points points;
    for (int64_t block = begin; block < end; ++block) {
      cpu::Samples samples = all;
      samples.values = values.read(block, value_buffer);
      const void* mass = masses ? masses->read(block, weight_buffer) : nullptr;
      if (chooses) {
        samples.kept = static_cast<const uint8_t*>(mass);
      } else {
        samples.weights = static_cast<const float*>(mass);
      }
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

void run_lookup(const Palettes& palettes, cpu::Lookup job) {
  const auto size = static_cast<size_t>(job.element_size);
  const std::vector<char> tables = size == 2   ? palettes.tables<uint16_t>()
                                   : size == 4 ? palettes.tables<uint32_t>()
                                               : palettes.tables<uint64_t>();
  job.kind = cpu::table_kind(palettes.clusters());
  job.tables = tables.data();
  cpu::kernels().palettes.lookup(job);
}

// The flags of a mask in the memory order of a tensor.
Tensor in_order_of(const Tensor& x, const Tensor& mask) {
  const Ints shape = to_ints(x.sizes()), strides = to_ints(x.strides());
  const Ints its_strides = to_ints(mask.strides());
  if (std::equal(strides.begin(), strides.end(), its_strides.begin())) return mask;
  Tensor copy = empty(shape, strides, ScalarType::Bool);
  torch::stable::copy_(copy, mask);
  return copy;
}

Tensor lookup(Tensor indices, Tensor centroids, Blocks block_size, Optional mask) {
  const int64_t dim = centroids.size(2);
  const auto element_size = static_cast<int64_t>(centroids.element_size());
  if (dim > 1) indices = torch::stable::contiguous(indices);
  Operand x(indices, dim > 1 ? ScalarType::Byte : centroids.scalar_type());
  const auto layout = cpu::make_layout(x.shape, x.order, index_blocks(block_size, dim));
  const Palettes palettes(centroids, layout);
  const Tensor output = dim > 1 ? empty(rows_times(x.shape, dim), centroids.scalar_type()) : x.output;
  STD_TORCH_CHECK(!mask || dim == 1, "mask is for scalars; centroids have ", dim, " entries");
  if (layout.geometry.numel > 0) {
    const Optional kept = mask ? Optional(in_order_of(output, *mask)) : std::nullopt;
    run_lookup(palettes, {{&layout.geometry, dim, row_size(x.shape)},
                          {},
                          nullptr,
                          static_cast<const uint8_t*>(x.data),
                          8,
                          output.mutable_data_ptr(),
                          element_size,
                          kept ? static_cast<const uint8_t*>(kept->const_data_ptr()) : nullptr});
  }
  return output;
}

Tensor lookup_packed(Tensor packed, Tensor centroids, Blocks sizes, Blocks block_size, int64_t bits) {
  const int64_t dim = centroids.size(2);
  const Tensor bytes = torch::stable::contiguous(packed);
  const Ints shape(sizes.data(), sizes.data() + sizes.size());
  const auto layout = cpu::make_layout(rows_over(shape, dim), natural_order(shape.size()), index_blocks(block_size, dim));
  STD_TORCH_CHECK(bytes.numel() == (layout.geometry.numel * bits + 7) / 8, "packed must have ",
                  (layout.geometry.numel * bits + 7) / 8, " bytes; it has ", bytes.numel());
  const Palettes palettes(centroids, layout);
  const Tensor output = empty(shape, centroids.scalar_type());
  if (layout.geometry.numel > 0) {
    run_lookup(palettes, {{&layout.geometry, dim, row_size(shape)},
                          {},
                          nullptr,
                          static_cast<const uint8_t*>(bytes.const_data_ptr()),
                          static_cast<int>(bits),
                          output.mutable_data_ptr(),
                          static_cast<int64_t>(centroids.element_size())});
  }
  return output;
}

Tensor palettize(Tensor weight, Tensor centroids, Blocks block_size, std::optional<int64_t> decimals) {
  STD_TORCH_CHECK(!decimals || centroids.size(2) == 1, "decimals are for scalars");
  if (is_double(weight)) weight = to_float(weight);
  const int64_t dim = centroids.size(2);
  if (dim > 1) weight = torch::stable::contiguous(weight);
  Operand x(weight, ScalarType::Byte);
  const Ints shape = rows_over(x.shape, dim);
  const auto layout = cpu::make_layout(shape, x.order, index_blocks(block_size, dim));
  const Palettes palettes(centroids, layout);
  const Tensor indices = dim > 1 ? empty(shape, ScalarType::Byte) : x.output;
  if (layout.geometry.numel == 0) return indices;
  const int64_t clusters = palettes.clusters(), room = cpu::table_room(clusters), blocks = layout.geometry.blocks;
  std::vector<float> table = palettes.values(), bounds;
  std::vector<int32_t> order;
  if (dim == 1) {
    bounds.assign(static_cast<size_t>(blocks * room), std::numeric_limits<float>::infinity());
    order.resize(static_cast<size_t>(blocks * room));
    for (int64_t i = 0; i < blocks; ++i) {
      decision_bounds(table.data() + i * clusters, clusters, bounds.data() + i * room, order.data() + i * room);
      if (decimals) bounds_before_rounding(bounds.data() + i * room, clusters - 1, power_of_ten(*decimals));
    }
  }
  cpu::kernels().palettes.palettize({{&layout.geometry, dim, row_size(shape)},
                                     clusters,
                                     element_of("weight", weight),
                                     x.data,
                                     static_cast<uint8_t*>(indices.mutable_data_ptr()),
                                     dim == 1 ? bounds.data() : table.data(),
                                     order.data()});
  return indices;
}

Tensor lookup_backward(Tensor grad, Tensor indices, Blocks block_size, int64_t clusters, int64_t dim) {
  if (is_double(grad)) grad = to_float(grad);
  grad = torch::stable::contiguous(grad);
  indices = torch::stable::contiguous(indices);
  const Ints shape = to_ints(indices.sizes());
  const auto layout = cpu::make_layout(shape, natural_order(shape.size()), index_blocks(block_size, dim));
  const int64_t numel = layout.geometry.numel, size = layout.geometry.blocks * clusters * dim;
  STD_TORCH_CHECK(grad.numel() == numel * dim, "grad must have ", numel * dim, " elements; it has ", grad.numel());
  const int64_t parts = parts_of(numel, size);
  std::vector<double> sums(static_cast<size_t>(parts * size));
  const cpu::SumByIndex all = {{&layout.geometry, dim, row_size(shape)},
                               clusters,
                               element_of("grad", grad),
                               grad.const_data_ptr(),
                               static_cast<const uint8_t*>(indices.const_data_ptr()),
                               0,
                               0,
                               nullptr};
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      cpu::SumByIndex job = all;
      job.first = numel * part / parts;
      job.last = numel * (part + 1) / parts;
      job.sums = sums.data() + part * size;
      cpu::kernels().palettes.sum_by_index(job);
    }
  });
  const int64_t sizes[] = {layout.geometry.blocks, clusters, dim};
  const Tensor result = empty(Ints(sizes, sizes + 3), ScalarType::Float);
  const std::vector<double> totals = sum_parts(sums, parts);
  std::transform(totals.begin(), totals.end(), static_cast<float*>(result.mutable_data_ptr()),
                 [](double x) { return static_cast<float>(x); });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(coreai_kernels, CPU, library) {
  COREAI_IMPL("kmeans_1d", &kmeans_1d);
  COREAI_IMPL("lookup", &lookup);
  COREAI_IMPL("lookup_backward", &lookup_backward);
  COREAI_IMPL("lookup_packed", &lookup_packed);
  COREAI_IMPL("palettize", &palettize);
}

}  // namespace
}  // namespace coreai
