// Lloyd's iterations on the CPU: see kernels/coreai_kernels/reference/kmeans.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "palette_tensors.h"

namespace coreai {
namespace {

// One block of vectors, of which the entries lie below each other.
struct Vectors {
  const cpu::Geometry* geometry;  // of one row
  const float* values;
  const float* mass;  // none: all weigh the same
  int64_t count, dim, clusters;
};

class Iteration {
 public:
  Iteration(const Vectors& vectors, float* centroids)
      : x_(vectors), centroids_(centroids), indices_(static_cast<size_t>(x_.count)),
        sums_(static_cast<size_t>(x_.clusters * x_.dim)), masses_(static_cast<size_t>(x_.clusters)) {
    if (x_.dim == 1) {
      const auto room = static_cast<size_t>(cpu::table_room(x_.clusters));
      bounds_.assign(room, std::numeric_limits<float>::infinity());
      order_.resize(room);
    }
  }

  // The largest squared distance by which a centroid moved.
  float step() {
    assign();
    add_up();
    float largest = 0;
    for (int64_t j = 0; j < x_.clusters; ++j) {
      const auto mass = static_cast<float>(masses_[static_cast<size_t>(j)]);
      if (!(mass > 0)) continue;
      float shift = 0;
      for (int64_t entry = 0; entry < x_.dim; ++entry) {
        const int64_t at = j * x_.dim + entry;
        const float moved = static_cast<float>(sums_[static_cast<size_t>(at)]) / mass;
        const float difference = moved - centroids_[at];
        shift += difference * difference;
        centroids_[at] = moved;
      }
      if (shift > largest || std::isnan(shift)) largest = shift;  // NaN stays
    }
    return largest;
  }

 private:
  void assign() {
    if (x_.dim == 1) decision_bounds(centroids_, x_.clusters, bounds_.data(), order_.data());
    cpu::kernels().palettes.palettize({{x_.geometry, x_.dim, x_.count}, x_.clusters, Element::kFloat32, x_.values,
                                       indices_.data(), x_.dim == 1 ? bounds_.data() : centroids_, order_.data()});
  }

  // In the order of the vectors, one sum a cluster: the reference's.
  void add_up() {
    std::fill(sums_.begin(), sums_.end(), 0.0);
    std::fill(masses_.begin(), masses_.end(), 0.0);
    for (int64_t entry = 0; entry < x_.dim; ++entry) {
      const float* values = x_.values + entry * x_.count;
      double* sums = sums_.data() + entry;
      for (int64_t i = 0; i < x_.count; ++i) {
        const float value = x_.mass ? values[i] * x_.mass[i] : values[i];
        sums[indices_[static_cast<size_t>(i)] * x_.dim] += value;
      }
    }
    for (int64_t i = 0; i < x_.count; ++i) {
      masses_[indices_[static_cast<size_t>(i)]] += x_.mass ? x_.mass[i] : 1.0f;
    }
  }

  const Vectors& x_;
  float* centroids_;
  std::vector<uint8_t> indices_;
  std::vector<double> sums_, masses_;
  std::vector<float> bounds_;
  std::vector<int32_t> order_;
};

Tensor lloyd(Tensor vectors, Optional mass, Tensor centroids, int64_t max_iterations, double limit) {
  vectors = torch::stable::contiguous(vectors);
  centroids = torch::stable::contiguous(centroids);
  if (mass) mass = torch::stable::contiguous(*mass);
  const int64_t blocks = vectors.size(0), dim = vectors.size(1), count = vectors.size(2);
  const int64_t clusters = centroids.size(2), size = clusters * dim;
  STD_TORCH_CHECK(centroids.size(1) == blocks && centroids.size(3) == dim,
                  "centroids must have one palette per block, and vectors of ", dim, " entries");
  STD_TORCH_CHECK(clusters >= 1 && clusters <= 256, "centroids must be 1 to 256 a block");
  const Tensor result = empty(to_ints(centroids.sizes()), ScalarType::Float);
  auto* out = static_cast<float*>(result.mutable_data_ptr());
  std::copy_n(static_cast<const float*>(centroids.const_data_ptr()), centroids.numel(), out);
  if (count == 0) return result;
  const auto layout = cpu::make_layout(one_axis(count), natural_order(1), {count});
  const auto* values = static_cast<const float*>(vectors.const_data_ptr());
  const auto* masses = mass ? static_cast<const float*>(mass->const_data_ptr()) : nullptr;
  const int64_t tasks = centroids.size(0) * blocks;
  // Too few tasks for the threads: these share out the assignment of one after the other.
  const int64_t grain = tasks >= cpu::threads() ? 1 : tasks;
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % blocks;
      const Vectors here = {&layout.geometry, values + block * dim * count, masses ? masses + block * count : nullptr,
                            count, dim, clusters};
      Iteration iteration(here, out + task * size);
      for (int64_t i = 0; i < max_iterations && iteration.step() > static_cast<float>(limit); ++i) {
      }
    }
  });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(coreai_kernels, CPU, library) { library.impl("lloyd", TORCH_BOX(&lloyd)); }

}  // namespace
}  // namespace coreai
