// Registration of the CPU kernels of torchao's simulator.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/tensors.h"

namespace coreai {
namespace {

bool is_float32(const Tensor& x) { return x.is_cpu() && x.scalar_type() == ScalarType::Float && x.is_contiguous(); }

// How many blocks of `run` elements there are.
int64_t blocks_of(const char* name, const Tensor& x, int64_t run) {
  STD_TORCH_CHECK(is_float32(x), name, " must be float32, contiguous and on the CPU");
  STD_TORCH_CHECK(run > 0 && run % 8 == 0 && x.numel() % run == 0, "run must be a multiple of 8 that divides ", x.numel(),
                  "; got ", run);
  return x.numel() / run;
}

void check_scale(const Tensor& scale, int64_t blocks) {
  check_block_values("scale", scale, ScalarType::Float, blocks);
  STD_TORCH_CHECK(scale.is_contiguous(), "scale must be contiguous");
}

std::tuple<Tensor, Tensor> by_reciprocal(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t run,
                                         bool chooses, bool is_symmetric, double low, double high, double eps,
                                         bool with_mask) {
  const int64_t blocks = blocks_of("input", input, run);
  check_scale(scale, blocks);
  check_block_values("zero_point", zero_point, ScalarType::Int, blocks);
  STD_TORCH_CHECK(zero_point.is_contiguous(), "zero_point must be contiguous");
  Tensor output = empty(to_ints(input.sizes()), ScalarType::Float), mask = empty_mask(input.numel(), with_mask);
  if (blocks == 0) return {output, mask};
  cpu::kernels().fake_quantize_by_reciprocal({.blocks = blocks,
                                              .run = run,
                                              .input = static_cast<const float*>(input.const_data_ptr()),
                                              .output = static_cast<float*>(output.mutable_data_ptr()),
                                              .mask = bytes_of(mask),
                                              .scale = static_cast<float*>(scale.mutable_data_ptr()),
                                              .zero_point = static_cast<int32_t*>(zero_point.mutable_data_ptr()),
                                              .chooses = chooses,
                                              .is_symmetric = is_symmetric,
                                              .low = static_cast<float>(low),
                                              .high = static_cast<float>(high),
                                              .eps = static_cast<float>(eps)});
  return {output, mask};
}

Tensor by_reciprocal_backward(const Tensor& grad, const Tensor& mask, const Tensor& scale, int64_t run) {
  const int64_t blocks = blocks_of("grad", grad, run);
  check_scale(scale, blocks);
  STD_TORCH_CHECK(
      mask.is_cpu() && mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() && mask.numel() * 8 == grad.numel(),
      "mask must have a bit an element of grad");
  Tensor output = empty(to_ints(grad.sizes()), ScalarType::Float);
  if (blocks == 0) return output;
  cpu::kernels().by_reciprocal_backward({.blocks = blocks,
                                         .run = run,
                                         .grad = static_cast<const float*>(grad.const_data_ptr()),
                                         .output = static_cast<float*>(output.mutable_data_ptr()),
                                         .mask = static_cast<const uint8_t*>(mask.const_data_ptr()),
                                         .scale = static_cast<const float*>(scale.const_data_ptr())});
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(coreai_kernels, CPU, library) {
  COREAI_IMPL("fake_quantize_by_reciprocal_", &by_reciprocal);
  COREAI_IMPL("fake_quantize_by_reciprocal_backward", &by_reciprocal_backward);
}

}  // namespace
}  // namespace coreai
