// Ranges of blocks, the parameters chosen from them, and observation with fake quantization in one call.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/jobs.h"

namespace coreai {
namespace {

// float32 values, in memory order of the blocks, to a row-major tensor of the input's type.
Tensor block_tensor(const std::vector<float>& values, const cpu::Layout& layout, const Ints& grid, ScalarType type) {
  Tensor result = empty(grid, ScalarType::Float);
  auto* data = static_cast<float*>(result.mutable_data_ptr());
  for (size_t i = 0; i < values.size(); ++i) data[layout.block_index.empty() ? i : layout.block_index[i]] = values[i];
  return type == ScalarType::Float ? result : torch::stable::to(result, type);
}

std::tuple<Tensor, Tensor> observe_range(const Tensor& input, const Blocks& block_size) {
  if (is_double(input)) {
    const auto [low, high] = observe_range(to_float(input), block_size);
    return {to_double(low), to_double(high)};
  }
  Operand x(input, input.scalar_type());
  const auto layout = cpu::make_layout(x.shape, x.order, block_size);
  std::vector<float> low(static_cast<size_t>(layout.geometry.blocks)), high(low.size());
  if (input.numel() > 0)
    cpu::kernels().observe_range({&layout.geometry, element_of("input", input), x.data, low.data(), high.data()});
  const Ints grid = grid_of(x.shape, block_size);
  return {block_tensor(low, layout, grid, input.scalar_type()), block_tensor(high, layout, grid, input.scalar_type())};
}

// Intermediate results have the wider type of the two bounds; two different narrow ones meet in float32.
Element common_element(const Tensor& low, const Tensor& high) {
  const Element a = element_of("min_val", low), b = element_of("max_val", high);
  return a == b && a != Element::kFloat64 ? a : Element::kFloat32;
}

std::tuple<Tensor, Tensor, Tensor> choose_qparams(const Tensor& min_val, const Tensor& max_val, int64_t scheme,
                                                  int64_t format, double quant_min, double quant_max, int64_t scale_format) {
  STD_TORCH_CHECK(min_val.numel() == max_val.numel(), "min_val and max_val must have one shape");
  const auto rule = QParamsRule::of(static_cast<Scheme>(scheme), static_cast<Format>(format), quant_min, quant_max,
                                    static_cast<ScaleFormat>(scale_format), common_element(min_val, max_val));
  const Tensor low = as_float32(min_val), high = as_float32(max_val);
  const Ints shape = to_ints(min_val.sizes());
  const Tensor scale = empty(shape, ScalarType::Float), zero_point = empty(shape, ScalarType::Int),
               minval = empty(shape, ScalarType::Float);
  cpu::kernels().choose_qparams(
      rule, static_cast<const float*>(low.const_data_ptr()), static_cast<const float*>(high.const_data_ptr()),
      min_val.numel(),
      {static_cast<float*>(scale.mutable_data_ptr()), static_cast<int32_t*>(zero_point.mutable_data_ptr()),
       static_cast<float*>(minval.mutable_data_ptr())});
  return {scale, zero_point, minval};
}

std::tuple<Tensor, Tensor> step(const Tensor& input, const StepState& state, const QuantConfig& config, bool has_running,
                                bool with_mask) {
  if (is_double(input)) {
    StepState narrow = state;
    narrow.running_min = to_float(state.running_min);
    narrow.running_max = to_float(state.running_max);
    const auto [output, bits] = step(to_float(input), narrow, config, has_running, with_mask);
    Optional kept_low = state.running_min, kept_high = state.running_max;
    if (kept_low) torch::stable::copy_(*kept_low, *narrow.running_min);
    if (kept_high) torch::stable::copy_(*kept_high, *narrow.running_max);
    return {to_double(output), bits};
  }
  const Tensor mask = empty_mask(input.numel(), with_mask);
  const Operand x(input, input.scalar_type());
  const auto layout = cpu::make_layout(x.shape, x.order, config.block_size);
  StepJob job(x, layout, state, config, has_running, bytes_of(mask));
  job.run();
  job.write_back();
  return {x.output, mask};
}

std::tuple<Tensor, Tensor> observe_and_fake_quantize_(const Tensor& input, const Tensor& scale, const Optional& zero_point,
                                                      const Optional& minval, const Optional& running_min,
                                                      const Optional& running_max, bool has_running, const Tensor& config,
                                                      bool with_mask) {
  return step(input, {scale, zero_point, minval, running_min, running_max}, QuantConfig::unpacked(config, input.dim()),
              has_running, with_mask);
}

std::tuple<Tensor, Tensor> observe_and_fake_quantize_unpacked_(
    const Tensor& input, const Tensor& scale, const Optional& zero_point, const Optional& minval,
    const Optional& running_min, const Optional& running_max, bool has_running, const Blocks& block_size, int64_t scheme,
    int64_t format, double quant_min, double quant_max, bool use_minval, int64_t update, double averaging_constant,
    std::optional<double> range_min, std::optional<double> range_max, int64_t scale_format, bool with_mask) {
  const auto config = QuantConfig::of(block_size, scheme, format, quant_min, quant_max, use_minval, update,
                                      averaging_constant, range_min, range_max, scale_format);
  return step(input, {scale, zero_point, minval, running_min, running_max}, config, has_running, with_mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> observe_and_fake_quantize(
    const Tensor& input, const Optional& running_min, const Optional& running_max, const Blocks& block_size, int64_t scheme,
    int64_t format, double quant_min, double quant_max, bool use_minval, int64_t update, double averaging_constant,
    std::optional<double> range_min, std::optional<double> range_max, int64_t scale_format, bool with_mask) {
  const Ints grid = grid_of(to_ints(input.sizes()), block_size);
  const Tensor scale = empty(grid, ScalarType::Float), zero_point = empty(grid, ScalarType::Int),
               minval = empty(grid, ScalarType::Float);
  Tensor low = empty(grid, input.scalar_type()), high = empty(grid, input.scalar_type());
  const bool has_running = running_min && running_max;
  if (has_running) {
    torch::stable::copy_(low, *running_min);
    torch::stable::copy_(high, *running_max);
  }
  const auto config = QuantConfig::of(block_size, scheme, format, quant_min, quant_max, use_minval, update,
                                      averaging_constant, range_min, range_max, scale_format);
  const auto [output, mask] = step(input, {scale, zero_point, minval, low, high}, config, has_running, with_mask);
  return {output, mask, scale, zero_point, minval, low, high};
}

STABLE_TORCH_LIBRARY_IMPL(coreai_kernels, CPU, library) {
  COREAI_IMPL("observe_range", &observe_range);
  COREAI_IMPL("choose_qparams", &choose_qparams);
  COREAI_IMPL("observe_and_fake_quantize", &observe_and_fake_quantize);
  COREAI_IMPL("observe_and_fake_quantize_", &observe_and_fake_quantize_);
  COREAI_IMPL("observe_and_fake_quantize_unpacked_", &observe_and_fake_quantize_unpacked_);
}

}  // namespace
}  // namespace coreai
