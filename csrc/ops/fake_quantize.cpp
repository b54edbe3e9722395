// fake_quantize with given parameters, and its gradient.
#include <torch/csrc/stable/library.h>

#include "ops/jobs.h"

namespace coreai {
namespace {

std::tuple<Tensor, Tensor> fake_quantize(const Tensor& input, const Tensor& scale, const Optional& zero_point,
                                         const Optional& minval, const Blocks& block_size, int64_t format, double quant_min,
                                         double quant_max, bool with_mask) {
  if (is_double(input)) {
    const auto [output, bits] =
        fake_quantize(to_float(input), scale, zero_point, minval, block_size, format, quant_min, quant_max, with_mask);
    return {to_double(output), bits};
  }
  const Tensor mask = empty_mask(input.numel(), with_mask);
  const Operand x(input, input.scalar_type());
  const auto layout = cpu::make_layout(x.shape, x.order, block_size);
  const FakeQuantizeJob job(x, layout, scale, zero_point, minval, format, quant_min, quant_max, bytes_of(mask));
  job.run();
  return {x.output, mask};
}

const uint8_t* bits_for(const Tensor& grad, const Tensor& mask) {
  STD_TORCH_CHECK(mask.numel() == (grad.numel() + 7) / 8,
                  "mask must have one bit per element of grad: ", (grad.numel() + 7) / 8, " bytes; it has ", mask.numel());
  return static_cast<const uint8_t*>(mask.const_data_ptr());
}

Ints order_of(const Tensor& x, const Blocks& axes) {
  return axes.empty() ? natural_order(static_cast<size_t>(x.dim())) : Ints(axes.data(), axes.data() + axes.size());
}

Tensor fake_quantize_backward(const Tensor& grad, const Tensor& mask, const Blocks& axes) {
  if (is_double(grad)) return to_double(fake_quantize_backward(to_float(grad), mask, axes));
  const uint8_t* bits = bits_for(grad, mask);
  const Ints order = order_of(grad, axes);
  Tensor result = MaskedGradientJob::empty_in_order(grad, order);
  MaskedGradientJob(grad, order, bits, result).run();
  return result;
}

void fake_quantize_backward_(Tensor grad, const Tensor& mask, const Blocks& axes) {
  if (is_double(grad)) {
    torch::stable::copy_(grad, fake_quantize_backward(grad, mask, axes));
  } else {
    MaskedGradientJob(grad, order_of(grad, axes), bits_for(grad, mask)).run();
  }
}

STABLE_TORCH_LIBRARY_IMPL(coreai_kernels, CPU, library) {
  COREAI_IMPL("fake_quantize", &fake_quantize);
  COREAI_IMPL("fake_quantize_forward", &fake_quantize);
  COREAI_IMPL("fake_quantize_backward", &fake_quantize_backward);
  COREAI_IMPL("fake_quantize_backward_", &fake_quantize_backward_);
}

}  // namespace
}  // namespace coreai
