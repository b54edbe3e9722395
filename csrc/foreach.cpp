// Operators on lists of tensors: one call, and one set of threads, for many small ones.
#include <torch/csrc/stable/library.h>

#include "lists.h"

namespace coreai {
namespace {

std::tuple<Tensors, Tensor> foreach_fake_quantize_forward(const Tensors& inputs, const Tensors& scales,
                                                          const Tensors& zero_points, const Tensors& minvals,
                                                          const Blocks& block_sizes, int64_t format, double quant_min,
                                                          double quant_max, bool with_mask) {
  return AffineList(scales, zero_points, minvals, block_sizes, format, quant_min, quant_max).run(inputs, with_mask);
}

Tensors foreach_fake_quantize_backward(const Tensors& grads, const Tensor& mask, const std::vector<int64_t>& starts,
                                       const std::vector<int64_t>& orders) {
  STD_TORCH_CHECK(starts.size() == grads.size(), "starts must have one entry for each gradient");
  const auto* bits = static_cast<const uint8_t*>(mask.const_data_ptr());
  Reader axes("orders", orders);
  Jobs<MaskedGradientJob> jobs;
  Tensors results;
  results.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const auto dim = static_cast<size_t>(grads[i].dim());
    const Ints order = orders.empty() ? natural_order(dim) : axes.take(dim);
    STD_TORCH_CHECK(starts[i] >= 0 && starts[i] + (grads[i].numel() + 7) / 8 <= mask.numel(),
                    "mask must have one bit per element of each gradient");
    results.push_back(MaskedGradientJob::empty_in_order(grads[i], order));
    jobs.add(grads[i], order, bits + starts[i], results.back());
  }
  jobs.finish();
  return results;
}

std::tuple<Tensors, Tensor> foreach_observe_and_fake_quantize_(
    const Tensors& inputs, const Tensors& scales, const Tensors& zero_points, const Tensors& minvals,
    const Tensors& running_mins, const Tensors& running_maxs, bool has_running, const Blocks& block_sizes,
    int64_t scheme, int64_t format, double quant_min, double quant_max, bool use_minval, int64_t update,
    double averaging_constant, std::optional<double> range_min, std::optional<double> range_max, bool power_of_two,
    bool with_mask) {
  const StepSettings settings = {has_running, scheme, format, quant_min, quant_max, use_minval, update, averaging_constant,
                                 range_min, range_max, power_of_two};
  return StepList(scales, zero_points, minvals, running_mins, running_maxs, block_sizes, settings)
      .run(inputs, with_mask);
}

STABLE_TORCH_LIBRARY_IMPL(coreai_kernels, CPU, library) {
  library.impl("foreach_fake_quantize_forward", TORCH_BOX(&foreach_fake_quantize_forward));
  library.impl("foreach_fake_quantize_backward", TORCH_BOX(&foreach_fake_quantize_backward));
  library.impl("foreach_observe_and_fake_quantize_", TORCH_BOX(&foreach_observe_and_fake_quantize_));
}

}  // namespace
}  // namespace coreai
