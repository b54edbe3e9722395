// observe_range and choose_qparams for CUDA tensors. The kernels are in cuda/quantize.
#include "cuda/quantize/observe_range.cuh"

#include <torch/csrc/stable/library.h>

#include "cuda/tensors.cuh"

namespace coreai::cuda {
namespace {

std::tuple<Tensor, Tensor> observe_range(const Tensor& input, const Blocks& block_size) {
  if (is_double(input)) {
    const auto [low, high] = observe_range(to_float(input), block_size);
    return {to_double(low), to_double(high)};
  }
  const int32_t device = input.get_device_index();
  const DeviceGuard guard(device);
  const DeviceInput x(input);
  const Element element = element_of("input", input);
  const auto layout = cpu::make_layout(x.shape, x.order, block_size);
  const cpu::Geometry& g = layout.geometry;
  const Ints grid = grid_of(x.shape, block_size);
  const Tensor low = empty_beside(input, grid, input.scalar_type()), high = empty_beside(input, grid, input.scalar_type());
  if (input.numel() == 0) return {low, high};
  const auto plan = plan_observe(g, element == Element::kFloat32 ? 4 : 8, is_aligned(x.data()), most_blocks(device));
  const Tensor workspace = empty_beside(input, one_axis(plan.workspace(g)), ScalarType::Float);
  const AfterRange after = {
      .element = element, .is_step = false, .kept_low = low.mutable_data_ptr(), .kept_high = high.mutable_data_ptr()};
  queue_observe(g, element, x.data(), plan, after, static_cast<float*>(workspace.mutable_data_ptr()), nullptr,
                most_blocks(device), current_stream(device));
  check_launch("observe_range");
  return {in_row_major(low, x, layout, block_size), in_row_major(high, x, layout, block_size)};
}

// Intermediate results have the wider type of the two bounds; two different narrow ones meet in float32.
Element common_element(const Tensor& low, const Tensor& high) {
  const Element a = element_of("min_val", low), b = element_of("max_val", high);
  return a == b && a != Element::kFloat64 ? a : Element::kFloat32;
}

std::tuple<Tensor, Tensor, Tensor> choose_qparams(const Tensor& min_val, const Tensor& max_val, int64_t scheme,
                                                  int64_t format, double quant_min, double quant_max, int64_t scale_format) {
  STD_TORCH_CHECK(min_val.numel() == max_val.numel(), "min_val and max_val must have one shape");
  STD_TORCH_CHECK(same_device(min_val, max_val), "max_val must be on the device of min_val");
  const auto rule = QParamsRule::of(static_cast<Scheme>(scheme), static_cast<Format>(format), quant_min, quant_max,
                                    static_cast<ScaleFormat>(scale_format), common_element(min_val, max_val));
  const int32_t device = min_val.get_device_index();
  const DeviceGuard guard(device);
  const Tensor low = as_float32(min_val), high = as_float32(max_val);
  const Ints shape = to_ints(min_val.sizes());
  const Tensor scale = empty_beside(min_val, shape, ScalarType::Float),
               zero_point = empty_beside(min_val, shape, ScalarType::Int),
               minval = empty_beside(min_val, shape, ScalarType::Float);
  const int64_t blocks = min_val.numel();
  if (blocks == 0) return {scale, zero_point, minval};
  const Tensor workspace = empty_beside(min_val, one_axis(blocks_of_largest(blocks)), ScalarType::Float);
  queue_choose(rule, static_cast<const float*>(low.const_data_ptr()), static_cast<const float*>(high.const_data_ptr()),
               blocks,
               {static_cast<float*>(scale.mutable_data_ptr()), static_cast<int32_t*>(zero_point.mutable_data_ptr()),
                static_cast<float*>(minval.mutable_data_ptr())},
               static_cast<float*>(workspace.mutable_data_ptr()), most_blocks(device), current_stream(device));
  check_launch("choose_qparams");
  return {scale, zero_point, minval};
}

COREAI_REGISTER(COREAI_GPU_LIBRARY, library) {
  library.impl("observe_range", TORCH_BOX(&observe_range));
  library.impl("choose_qparams", TORCH_BOX(&choose_qparams));
}

}  // namespace
}  // namespace coreai::cuda
