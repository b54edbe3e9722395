// Operators on lists of tensors: one call, and one set of threads, for many small ones.
#include <torch/csrc/stable/library.h>

#include "ops/foreach.h"

namespace coreai {
namespace {

std::tuple<Tensors, Tensor> foreach_fake_quantize_forward(const Tensors& inputs, const Tensors& scales,
                                                          const Tensors& zero_points, const Tensors& minvals,
                                                          const Blocks& block_sizes, int64_t format, double quant_min,
                                                          double quant_max, bool with_mask) {
  return AffineList(scales, zero_points, minvals, block_sizes, format, quant_min, quant_max).run(inputs, with_mask);
}

// Calls `add(index, order, bits)` for each gradient.
template <class Add>
void for_each_gradient(const Tensors& grads, const Tensor& mask, const std::vector<int64_t>& starts,
                       const std::vector<int64_t>& orders, Add add) {
  STD_TORCH_CHECK(starts.size() == grads.size(), "starts must have one entry for each gradient");
  const auto* bits = static_cast<const uint8_t*>(mask.const_data_ptr());
  Reader axes("orders", orders);
  for (size_t i = 0; i < grads.size(); ++i) {
    const auto dim = static_cast<size_t>(grads[i].dim());
    const Ints order = orders.empty() ? natural_order(dim) : axes.take(dim);
    STD_TORCH_CHECK(starts[i] >= 0 && starts[i] + (grads[i].numel() + 7) / 8 <= mask.numel(),
                    "mask must have one bit per element of each gradient");
    add(i, order, bits + starts[i]);
  }
}

Tensors foreach_fake_quantize_backward(const Tensors& grads, const Tensor& mask, const std::vector<int64_t>& starts,
                                       const std::vector<int64_t>& orders) {
  Jobs<MaskedGradientJob> jobs;
  Tensors results;
  results.reserve(grads.size());
  for_each_gradient(grads, mask, starts, orders, [&](size_t i, const Ints& order, const uint8_t* bits) {
    results.push_back(MaskedGradientJob::empty_in_order(grads[i], order));
    jobs.add(grads[i], order, bits, results.back());
  });
  jobs.finish();
  return results;
}

void foreach_fake_quantize_backward_(Tensors grads, const Tensor& mask, const std::vector<int64_t>& starts,
                                     const std::vector<int64_t>& orders) {
  Jobs<MaskedGradientJob> jobs;
  for_each_gradient(grads, mask, starts, orders,
                    [&](size_t i, const Ints& order, const uint8_t* bits) { jobs.add(grads[i], order, bits); });
  jobs.finish();
}

std::tuple<Tensors, Tensor> foreach_observe_and_fake_quantize_(
    const Tensors& inputs, const Tensors& scales, const Tensors& zero_points, const Tensors& minvals,
    const Tensors& running_mins, const Tensors& running_maxs, bool has_running, const Blocks& block_sizes, int64_t scheme,
    int64_t format, double quant_min, double quant_max, bool use_minval, int64_t update, double averaging_constant,
    std::optional<double> range_min, std::optional<double> range_max, int64_t scale_format, bool with_mask) {
  const auto config = QuantConfig::of(block_sizes, scheme, format, quant_min, quant_max, use_minval, update,
                                      averaging_constant, range_min, range_max, scale_format);
  return StepList(scales, zero_points, minvals, running_mins, running_maxs, config, has_running).run(inputs, with_mask);
}

STABLE_TORCH_LIBRARY_IMPL(coreai_kernels, CPU, library) {
  COREAI_IMPL("foreach_fake_quantize_forward", &foreach_fake_quantize_forward);
  COREAI_IMPL("foreach_fake_quantize_backward", &foreach_fake_quantize_backward);
  COREAI_IMPL("foreach_fake_quantize_backward_", &foreach_fake_quantize_backward_);
  COREAI_IMPL("foreach_observe_and_fake_quantize_", &foreach_observe_and_fake_quantize_);
}

}  // namespace
}  // namespace coreai
