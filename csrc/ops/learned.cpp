// Registration of the CPU kernels for what compression learns: masks drawn from logits, and ranges.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/tensors.h"

namespace coreai {
namespace {

// `x` in the memory format of a dense tensor with these strides.
Tensor laid_out(const Tensor& x, const Ints& shape, const Ints& strides, const Ints& order) {
  if (is_dense(shape, to_ints(x.strides()), order)) return x;
  Tensor result = empty(shape, strides, x.scalar_type());
  torch::stable::copy_(result, x);
  return result;
}

cpu::SampledMask sampled_job(const Operand& w, const Tensor& weight, const Tensor& logits, const Tensor& draw,
                             int64_t seed) {
  STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float, "logits must be float32");
  STD_TORCH_CHECK(draw.scalar_type() == ScalarType::Long && draw.numel() == 1 && draw.is_cpu(),
                  "draw must be one int64 on the CPU");
  return {element_of("weight", weight),
          weight.numel(),
          w.data,
          static_cast<const float*>(logits.const_data_ptr()),
          nullptr,
          w.output.mutable_data_ptr(),
          nullptr,
          static_cast<uint64_t>(*static_cast<const int64_t*>(draw.const_data_ptr())),
          static_cast<uint64_t>(seed)};
}

Tensor sampled_mask(Tensor weight, Tensor logits, Tensor draw, int64_t seed) {
  STD_TORCH_CHECK(weight.scalar_type() != ScalarType::Double, "weight must be float32, bfloat16 or float16");
  Operand w(weight, weight.scalar_type());
  const Tensor s = laid_out(logits, w.shape, to_ints(w.output.strides()), w.order);
  if (weight.numel() > 0) cpu::kernels().sampled_mask(sampled_job(w, weight, s, draw, seed));
  return w.output;
}

std::tuple<Tensor, Tensor> sampled_mask_backward(Tensor grad, Tensor weight, Tensor logits, Tensor draw, int64_t seed) {
  STD_TORCH_CHECK(weight.scalar_type() != ScalarType::Double, "weight must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(grad.scalar_type() == weight.scalar_type(), "grad must have the weight's dtype");
  Operand w(weight, weight.scalar_type());
  const Ints strides = to_ints(w.output.strides());
  const Tensor s = laid_out(logits, w.shape, strides, w.order), g = laid_out(grad, w.shape, strides, w.order);
  const Tensor to_logits = empty(w.shape, strides, ScalarType::Float);
  if (weight.numel() > 0) {
    // Each element is read before it is written, so the output may be the copy of the weight.
    cpu::SampledMask job = sampled_job(w, weight, s, draw, seed);
    job.grad = g.const_data_ptr();
    job.to_logits = static_cast<float*>(to_logits.mutable_data_ptr());
    cpu::kernels().sampled_mask(job);
  }
  return {w.output, to_logits};
}

std::tuple<Tensor, Tensor, Tensor> learnable_range_backward(Tensor grad, Tensor input, Optional low, Tensor range,
                                                            Blocks block_size, double level_low, double level_high) {
  if (is_double(input)) {
    const auto [to_input, to_low, to_range] =
        learnable_range_backward(to_float(grad), to_float(input), low, range, block_size, level_low, level_high);
    return {to_double(to_input), to_low, to_range};
  }
  STD_TORCH_CHECK(grad.scalar_type() == input.scalar_type(), "grad must have the input's dtype");
  Operand x(input, input.scalar_type());
  const auto layout = cpu::make_layout(x.shape, x.order, block_size);
  const int64_t blocks = layout.geometry.blocks;
  check_block_values("range", range, ScalarType::Float, blocks);
  const Tensor dense_range = torch::stable::contiguous(range);
  BlockValues<float> ranges(dense_range, layout.block_index, true);
  std::optional<BlockValues<float>> lows;
  Optional dense_low;
  if (low) {
    check_block_values("low", *low, ScalarType::Float, blocks);
    dense_low = torch::stable::contiguous(*low);
    lows.emplace(*dense_low, layout.block_index, true);
  }
  const Ints shape = to_ints(range.sizes());
  Tensor to_low = empty(shape, ScalarType::Float), to_range = empty(shape, ScalarType::Float);
  constexpr int64_t kPiece = 4096;  // the unit in which the kernel sums a single block
  const int64_t sums = blocks == 1 ? (input.numel() + kPiece - 1) / kPiece : blocks;
  std::vector<double> partial(static_cast<size_t>(2 * sums), 0.0);
  if (input.numel() > 0) {
    const Tensor g = laid_out(grad, x.shape, to_ints(x.output.strides()), x.order);
    cpu::kernels().learnable_range({&layout.geometry, element_of("input", input), g.const_data_ptr(), x.data,
                                    x.output.mutable_data_ptr(), data_or_null(lows), ranges.data(),
                                    static_cast<float>(level_low), static_cast<float>(level_high), partial.data()});
  }
  if (blocks == 1) {
    for (int64_t i = 1; i < sums; ++i) {
      for (size_t j = 0; j < 2; ++j) partial[j] += partial[static_cast<size_t>(2 * i) + j];
    }
    if (sums == 0) partial.assign(2, 0.0);
  }
  auto* low_data = static_cast<float*>(to_low.mutable_data_ptr());
  auto* range_data = static_cast<float*>(to_range.mutable_data_ptr());
  for (size_t i = 0; i < static_cast<size_t>(blocks); ++i) {
    const auto at = layout.block_index.empty() ? static_cast<int64_t>(i) : layout.block_index[i];
    low_data[at] = low ? static_cast<float>(partial[2 * i]) : 0.0f;
    range_data[at] = static_cast<float>(partial[2 * i + 1]);
  }
  return {x.output, to_low, to_range};
}

STABLE_TORCH_LIBRARY_IMPL(coreai_kernels, CPU, library) {
  COREAI_IMPL("learnable_range_backward", &learnable_range_backward);
  COREAI_IMPL("sampled_mask", &sampled_mask);
  COREAI_IMPL("sampled_mask_backward", &sampled_mask_backward);
  COREAI_IMPL("sampled_mask_forward", &sampled_mask);
}

}  // namespace
}  // namespace coreai
