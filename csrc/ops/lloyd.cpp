// Lloyd's iterations on the CPU: see kernels/coreai_kernels/reference/kmeans.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/parallel_for.h"
#include "ops/palette_tensors.h"

namespace coreai {
namespace {

using cpu::Layout;
using std::size_t;

constexpr int64_t kPartVectors = 1 << 15, kLanes = 8;
constexpr double kStride = 1.6;

// One block of vectors, of which the entries lie below each other.
struct Vectors {
  const Layout *full_part, *last_part;
  const float* values;
  const float* mass;  // none: all weigh the same
  int64_t count, dim, clusters;
  const double* center;
  double total;

  int64_t parts() const { return std::max<int64_t>(1, (count + kPartVectors - 1) / kPartVectors); }
};

// One try for one block.
class Iteration {
 public:
  Iteration(const Vectors& vectors, float* centroids, double* masses, double* spread)
      : x_(vectors),
        centroids_(centroids),
        masses_(masses),
        spread_(spread),
        width_(vectors.dim + 1),
        size_(static_cast<size_t>(vectors.clusters * width_)),
        indices_(static_cast<size_t>(vectors.count)),
        sums_(size_),
        part_sums_(size_ * static_cast<size_t>(vectors.parts())) {
    if (x_.dim == 1) {
      const auto room = static_cast<size_t>(cpu::table_room(x_.clusters));
      bounds_.assign(room, std::numeric_limits<float>::infinity());
      order_.resize(room);
    }
  }

  void run(int64_t max_iterations, double tolerance) {
    double last = -std::numeric_limits<double>::infinity(), stride = kStride;
    if (max_iterations <= 0) add_up(&Iteration::assign_part);
    for (int64_t i = 0; i < max_iterations; ++i) {
      add_up(&Iteration::assign_part);
      const double gain = this->gain();
      if (!(gain - last > tolerance * std::max(x_.total - gain, 0.0))) {
        if (stride == 1) break;
        stride = 1;
      }
      if (i + 1 < max_iterations) move(stride);
      last = gain;
    }
    if (max_iterations > 0) move(1);
    for (int64_t j = 0; j < x_.clusters; ++j) masses_[j] = sum(j)[x_.dim];
    add_up(&Iteration::spread_part);
    for (int64_t j = 0; j < x_.clusters; ++j) std::copy_n(sum(j), x_.dim, spread_ + j * x_.dim);
  }

 private:
  using Part = void (Iteration::*)(int64_t part, std::vector<double>& lanes);

  double* sum(int64_t cluster) { return sums_.data() + cluster * width_; }

  // By what the squared error around the means is below the total.
  double gain() {
    double gain = 0;
    for (int64_t j = 0; j < x_.clusters; ++j) {
      const double mass = sum(j)[x_.dim];
      if (!(mass > 0)) continue;
      for (int64_t entry = 0; entry < x_.dim; ++entry) {
        const double around = sum(j)[entry] - mass * x_.center[entry];
        gain += around * around / mass;
      }
    }
    return gain;
  }

  // Centroids to the means, or beyond by `stride` times the way.
  void move(double stride) {
    for (int64_t j = 0; j < x_.clusters; ++j) {
      const double mass = sum(j)[x_.dim];
      if (!(mass > 0)) continue;
      for (int64_t entry = 0; entry < x_.dim; ++entry) {
        float& centroid = centroids_[j * x_.dim + entry];
        const double mean = sum(j)[entry] / mass, from = centroid;
        centroid = static_cast<float>(stride == 1 ? mean : from + stride * (mean - from));
      }
    }
  }

  void add_up(Part add_part) {
    if (x_.dim == 1) decision_bounds(centroids_, x_.clusters, bounds_.data(), order_.data());
    const int64_t parts = x_.parts();
    cpu::parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> lanes(size_ * kLanes);
      for (int64_t part = begin; part < end; ++part) {
        std::fill(lanes.begin(), lanes.end(), 0.0);
        (this->*add_part)(part, lanes);
        double* sums = part_sums_.data() + static_cast<size_t>(part) * size_;
        std::copy_n(lanes.data(), size_, sums);
        for (size_t i = size_; i < lanes.size(); ++i) sums[i % size_] += lanes[i];
      }
    });
    std::copy_n(part_sums_.data(), size_, sums_.data());
    for (size_t i = size_; i < part_sums_.size(); ++i) sums_[i % size_] += part_sums_[i];
  }

  void assign_part(int64_t part, std::vector<double>& lanes) {
    const int64_t begin = part * kPartVectors, end = std::min(x_.count, begin + kPartVectors);
    const Layout& layout = end - begin == kPartVectors ? *x_.full_part : *x_.last_part;
    if (end > begin) {
      cpu::kernels().palettes.palettize({{&layout.geometry, x_.dim, x_.count},
                                         x_.clusters,
                                         Element::kFloat32,
                                         x_.values + begin,
                                         indices_.data() + begin,
                                         x_.dim == 1 ? bounds_.data() : centroids_,
                                         order_.data()});
    }
    over_lanes(begin, end, lanes, [](double value, float) { return value; });
  }

  void spread_part(int64_t part, std::vector<double>& lanes) {
    const int64_t begin = part * kPartVectors, end = std::min(x_.count, begin + kPartVectors);
    over_lanes(begin, end, lanes, [](double value, float centroid) {
      const double apart = value - static_cast<double>(centroid);
      return apart * apart;
    });
  }

  template <class Value>
  void over_lanes(int64_t begin, int64_t end, std::vector<double>& lanes, Value value) {
    const auto with_mass = [&](auto dim) {
      if (x_.mass) return add<decltype(dim)::value, true>(begin, end, lanes.data(), value);
      add<decltype(dim)::value, false>(begin, end, lanes.data(), value);
    };
    switch (x_.dim) {  // known lengths unroll
      case 2:
        return with_mass(std::integral_constant<int, 2>());
      case 4:
        return with_mass(std::integral_constant<int, 4>());
      default:
        return with_mass(std::integral_constant<int, 0>());
    }
  }

  // Neighbours add to different lanes, so that no addition waits for the one before.
  template <int kDim, bool kWeighted, class Value>
  void add(int64_t begin, int64_t end, double* lanes, Value value) {
    const int64_t dim = kDim > 0 ? kDim : x_.dim, width = dim + 1;
    for (int64_t first = begin; first < end; first += kLanes) {
      const int64_t last = std::min(first + kLanes, end);
      for (int64_t i = first; i < last; ++i) {
        const int64_t cluster = indices_[static_cast<size_t>(i)];
        double* to = lanes + (i - first) * static_cast<int64_t>(size_) + cluster * width;
        const double mass = kWeighted ? static_cast<double>(x_.mass[i]) : 1.0;
        for (int64_t entry = 0; entry < dim; ++entry) {
          const double at = value(x_.values[entry * x_.count + i], centroids_[cluster * dim + entry]);
          to[entry] += kWeighted ? at * mass : at;
        }
        to[dim] += mass;
      }
    }
  }

  const Vectors& x_;
  float* centroids_;
  double *masses_, *spread_;
  int64_t width_;  // of a cluster's sums: of each entry, and of the masses
  size_t size_;
  std::vector<uint8_t> indices_;
  std::vector<double> sums_, part_sums_;
  std::vector<float> bounds_;
  std::vector<int32_t> order_;
};

std::tuple<Tensor, Tensor, Tensor> lloyd(Tensor vectors, Optional mass, Tensor centroids, Tensor center, Tensor total,
                                         int64_t max_iterations, double tolerance) {
  vectors = torch::stable::contiguous(vectors);
  centroids = torch::stable::contiguous(centroids);
  center = torch::stable::contiguous(center);
  total = torch::stable::contiguous(total);
  if (mass) mass = torch::stable::contiguous(*mass);
  const int64_t blocks = vectors.size(0), dim = vectors.size(1), count = vectors.size(2);
  const int64_t tries = centroids.size(0), clusters = centroids.size(2), size = clusters * dim;
  STD_TORCH_CHECK(centroids.size(1) == blocks && centroids.size(3) == dim,
                  "centroids must have one palette per block, and vectors of ", dim, " entries");
  STD_TORCH_CHECK(clusters >= 1 && clusters <= 256, "centroids must be 1 to 256 a block");
  STD_TORCH_CHECK(center.size(0) == blocks && center.size(1) == dim && total.size(0) == blocks,
                  "center and total must have a vector and a number per block");
  const int64_t sizes[] = {tries, blocks, clusters, dim};
  const Tensor result = empty(Ints(sizes, sizes + 4), ScalarType::Float);
  const Tensor masses = empty(Ints(sizes, sizes + 3), ScalarType::Double);
  const Tensor spread = empty(Ints(sizes, sizes + 4), ScalarType::Double);
  auto* out = static_cast<float*>(result.mutable_data_ptr());
  std::copy_n(static_cast<const float*>(centroids.const_data_ptr()), centroids.numel(), out);
  const auto layout_of = [](int64_t length) { return cpu::make_layout(one_axis(length), natural_order(1), {length}); };
  const Layout full = layout_of(kPartVectors), last = layout_of(std::max<int64_t>(1, count % kPartVectors));
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % blocks;
      const Vectors here = {&full,
                            &last,
                            static_cast<const float*>(vectors.const_data_ptr()) + block * dim * count,
                            mass ? static_cast<const float*>(mass->const_data_ptr()) + block * count : nullptr,
                            count,
                            dim,
                            clusters,
                            static_cast<const double*>(center.const_data_ptr()) + block * dim,
                            static_cast<const double*>(total.const_data_ptr())[block]};
      Iteration(here, out + task * size, static_cast<double*>(masses.mutable_data_ptr()) + task * clusters,
                static_cast<double*>(spread.mutable_data_ptr()) + task * size)
          .run(max_iterations, tolerance);
    }
  };
  // Too few tasks for the threads: these share out the parts of one after the other.
  const int64_t tasks = tries * blocks;
  cpu::parallel_for(tasks, tasks >= cpu::threads() ? 1 : tasks, work);
  return {result, masses, spread};
}

STABLE_TORCH_LIBRARY_IMPL(coreai_kernels, CPU, library) { COREAI_IMPL("lloyd", &lloyd); }

}  // namespace
}  // namespace coreai
