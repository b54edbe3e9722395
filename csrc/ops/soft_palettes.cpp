// Registration of the CPU kernels of differentiable k-means.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "ops/palette_tensors.h"

namespace coreai {
namespace {

// As LEAST_MASS in kernels/coreai_kernels/reference/soft_palettize.py.
constexpr double kLeastMass = 0x1p-100;

// A weight with its palettes, an output like it, and sums over each cluster: what all four operators need.
class SoftProblem {
 public:
  SoftProblem(const Tensor& weight, const Tensor& centroids, double temperature, const Blocks& block_size)
      : dim_(centroids.size(2)),
        given_(weight),
        weight_(dim_ > 1 ? torch::stable::contiguous(weight) : weight),
        x_(weight_, weight.scalar_type()),
        layout_(cpu::make_layout(rows_over(x_.shape, dim_), x_.order, index_blocks(block_size, dim_))),
        palettes_(centroids, layout_),
        table_(palettes_.values()) {
    constexpr double kLargest = std::numeric_limits<float>::max();
    job_ = {{&layout_.geometry, dim_, row_size(x_.shape)},
            palettes_.clusters(),
            element_of("weight", weight),
            static_cast<float>(std::min(1.0 / temperature, kLargest / 2)),
            x_.data,
            table_.data(),
            nullptr,
            nullptr,
            nullptr,
            x_.output.mutable_data_ptr(),
            nullptr,
            nullptr,
            nullptr,
            0,
            0};
  }
  SoftProblem(const SoftProblem&) = delete;

  cpu::Soft& job() { return job_; }
  // In the memory format of the weight.
  Tensor output() const {
    if (dim_ == 1 || given_.is_contiguous()) return x_.output;
    Tensor result = torch::stable::empty_like(given_);
    torch::stable::copy_(result, x_.output);
    return result;
  }
  const Palettes& palettes() const { return palettes_; }
  int64_t values() const { return static_cast<int64_t>(table_.size()); }
  // A tensor of the weight's shape and type in the memory order in which the kernel goes through the weight.
  const void* like_weight(const Tensor& grad) {
    kept_.emplace(grad);
    if (!dense_like(grad)) {
      kept_.emplace(empty(x_.shape, to_ints(x_.output.strides()), x_.output.scalar_type()));
      torch::stable::copy_(*kept_, grad);
    }
    return kept_->const_data_ptr();
  }

  // Sums over clusters and their masses, in memory order of the blocks.
  std::tuple<std::vector<double>, std::vector<double>> run(cpu::SoftStep step) {
    const bool sums_wanted = step != cpu::SoftStep::kPalettize;
    const int64_t numel = layout_.geometry.numel, size = values(), rows = size / dim_;
    const int64_t parts = sums_wanted ? parts_of(numel, size) : std::max<int64_t>(1, numel / kPart);
    std::vector<double> sums(static_cast<size_t>(sums_wanted ? parts * size : 0));
    std::vector<double> masses(static_cast<size_t>(step == cpu::SoftStep::kCentroids ? parts * rows : 0));
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(static_cast<size_t>(cpu::soft_scratch(job_.clusters, dim_)));
      for (int64_t part = begin; part < end; ++part) {
        cpu::Soft job = job_;
        job.first = numel * part / parts;
        job.last = numel * (part + 1) / parts;
        job.scratch = scratch.data();
        if (!sums.empty()) job.sums = sums.data() + part * size;
        if (!masses.empty()) job.masses = masses.data() + part * rows;
        cpu::kernels().palettes.soft(step, job);
      }
    });
    return {sum_parts(sums, parts), sum_parts(masses, parts)};
  }

  // Values of (blocks, clusters, width), in memory order of the blocks, as float32 in row-major order; or back.
  Tensor tensor_of(const std::vector<double>& values, int64_t width) const {
    const int64_t sizes[] = {layout_.geometry.blocks, job_.clusters, width};
    const Tensor result = empty(Ints(sizes, sizes + (width == 0 ? 2 : 3)), ScalarType::Float);
    auto* out = static_cast<float*>(result.mutable_data_ptr());
    const int64_t row = job_.clusters * std::max<int64_t>(1, width);
    for (int64_t i = 0; i < layout_.geometry.blocks; ++i) {
      for (int64_t j = 0; j < row; ++j) {
        out[palettes_.source(i) * row + j] = static_cast<float>(values[static_cast<size_t>(i * row + j)]);
      }
    }
    return result;
  }
  std::vector<float> in_memory_order(const Tensor& values) const {
    const Tensor floats = as_float32(values);
    const auto* from = static_cast<const float*>(floats.const_data_ptr());
    const int64_t row = floats.numel() / std::max<int64_t>(1, layout_.geometry.blocks);
    std::vector<float> result(static_cast<size_t>(floats.numel()));
    for (int64_t i = 0; i < layout_.geometry.blocks; ++i) {
      std::copy_n(from + palettes_.source(i) * row, row, result.data() + i * row);
    }
    return result;
  }

 private:
  bool dense_like(const Tensor& grad) const {
    return grad.scalar_type() == x_.output.scalar_type() && is_dense(x_.shape, to_ints(grad.strides()), x_.order);
  }

  int64_t dim_;
  Tensor given_, weight_;
  Operand x_;
  cpu::Layout layout_;
  Palettes palettes_;
  std::vector<float> table_;
  std::optional<Tensor> kept_;
  cpu::Soft job_;
};

Tensor soft_palettize(Tensor weight, Tensor centroids, double temperature, Blocks block_size) {
  if (is_double(weight)) return to_double(soft_palettize(to_float(weight), centroids, temperature, block_size));
  SoftProblem problem(weight, centroids, temperature, block_size);
  problem.run(cpu::SoftStep::kPalettize);
  return problem.output();
}

std::tuple<Tensor, Tensor> soft_palettize_backward(Tensor grad, Tensor weight, Tensor centroids, double temperature,
                                                   Blocks block_size) {
  if (is_double(weight)) {
    const auto [to_weight, to_centroids] =
        soft_palettize_backward(to_float(grad), to_float(weight), centroids, temperature, block_size);
    return {to_double(to_weight), to_centroids};
  }
  SoftProblem problem(weight, centroids, temperature, block_size);
  problem.job().grad = problem.like_weight(grad);
  const auto [sums, masses] = problem.run(cpu::SoftStep::kPalettizeBackward);
  return {problem.output(), problem.tensor_of(sums, centroids.size(2))};
}

std::tuple<Tensor, Tensor> soft_centroids(Tensor weight, Tensor centroids, double temperature, Blocks block_size) {
  if (is_double(weight)) return soft_centroids(to_float(weight), centroids, temperature, block_size);
  SoftProblem problem(weight, centroids, temperature, block_size);
  auto [sums, masses] = problem.run(cpu::SoftStep::kCentroids);
  const auto dim = static_cast<size_t>(centroids.size(2));
  for (size_t i = 0; i < sums.size(); ++i) {
    const double mass = masses[i / dim];
    sums[i] = mass < kLeastMass ? problem.job().centroids[i] : sums[i] / mass;
  }
  return {problem.tensor_of(sums, centroids.size(2)), problem.tensor_of(masses, 0)};
}

std::tuple<Tensor, Tensor> soft_centroids_backward(Tensor grad, Tensor moved, Tensor mass, Tensor weight, Tensor centroids,
                                                   double temperature, Blocks block_size) {
  if (is_double(weight)) {
    const auto [to_weight, to_centroids] =
        soft_centroids_backward(grad, moved, mass, to_float(weight), centroids, temperature, block_size);
    return {to_double(to_weight), to_centroids};
  }
  SoftProblem problem(weight, centroids, temperature, block_size);
  const std::vector<float> grads = problem.in_memory_order(grad), means = problem.in_memory_order(moved),
                           masses = problem.in_memory_order(mass);
  std::vector<float> rates(grads.size()), offsets(masses.size());
  const size_t dim = static_cast<size_t>(centroids.size(2));
  for (size_t i = 0; i < grads.size(); ++i) {
    if (masses[i / dim] < kLeastMass) continue;
    rates[i] = grads[i] / masses[i / dim];
    offsets[i / dim] += rates[i] * means[i];
  }
  problem.job().rates = rates.data();
  problem.job().offsets = offsets.data();
  auto [sums, unused] = problem.run(cpu::SoftStep::kCentroidsBackward);
  for (size_t i = 0; i < grads.size(); ++i) {
    if (masses[i / dim] < kLeastMass) sums[i] += grads[i];
  }
  return {problem.output(), problem.tensor_of(sums, centroids.size(2))};
}

STABLE_TORCH_LIBRARY_IMPL(coreai_kernels, CPU, library) {
  COREAI_IMPL("soft_centroids", &soft_centroids);
  COREAI_IMPL("soft_centroids_backward", &soft_centroids_backward);
  COREAI_IMPL("soft_palettize", &soft_palettize);
  COREAI_IMPL("soft_palettize_backward", &soft_palettize_backward);
}

}  // namespace
}  // namespace coreai
