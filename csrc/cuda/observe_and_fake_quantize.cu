// observe_and_fake_quantize for CUDA tensors, in its three forms. The kernels are in cuda/quantize.
#include "cuda/quantize/observe_and_fake_quantize.cuh"

#include <torch/csrc/stable/library.h>

#include "cuda/quantize/queue.h"
#include "cuda/tensors.cuh"
#include "ops/quant_config.h"

namespace coreai::cuda {
namespace {

struct StepState {
  Tensor scale;
  Optional zero_point, minval, running_min, running_max;
};

// A part of the state, in memory order of the blocks: the tensor itself where that is row-major order.
class BlockState {
 public:
  BlockState(const char* name, const Optional& tensor, ScalarType type, const DeviceInput& x, const cpu::Layout& layout,
             const Blocks& block)
      : tensor_(tensor), x_(&x), layout_(&layout), block_(&block) {
    if (!tensor) return;
    STD_TORCH_CHECK(tensor->is_contiguous(), name, " must be contiguous");
    values_ = in_memory_order(name, *tensor, type, x, layout, block);
  }
  void* data() const { return values_ ? values_->mutable_data_ptr() : nullptr; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data());
  }
  void write_back() {
    if (!values_ || layout_->block_index.empty()) return;
    const Tensor found = in_row_major(*values_, *x_, *layout_, *block_);
    const Ints shape = to_ints(tensor_->sizes());
    torch::stable::copy_(*tensor_, torch::stable::reshape(found, {shape.data(), shape.size()}));
  }

 private:
  Optional tensor_, values_;
  const DeviceInput* x_;
  const cpu::Layout* layout_;
  const Blocks* block_;
};

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
  const int32_t device = input.get_device_index();
  const DeviceGuard guard(device);
  const DeviceInput x(input);
  const ScalarType type = input.scalar_type();
  const Element element = element_of("input", input);
  const Tensor output = x.output(type), mask = empty_mask_beside(input, with_mask);
  const auto layout = cpu::make_layout(x.shape, x.order, config.block_size);
  const cpu::Geometry& g = layout.geometry;
  // The kernels read back what they choose: they get room where the caller keeps nothing.
  const auto or_room = [&](const Optional& values, bool needed, ScalarType its) {
    return values || !needed ? values : Optional(empty_beside(input, one_axis(g.blocks), its));
  };
  const auto part = [&](const char* name, const Optional& values, ScalarType its) {
    return BlockState(name, values, its, x, layout, config.block_size);
  };
  BlockState scale = part("scale", state.scale, ScalarType::Float);
  BlockState zero_point =
      part("zero_point", or_room(state.zero_point, config.uses_zero_point(), ScalarType::Int), ScalarType::Int);
  BlockState minval = part("minval", or_room(state.minval, config.uses_minval(), ScalarType::Float), ScalarType::Float);
  BlockState low = part("running_min", state.running_min, type), high = part("running_max", state.running_max, type);
  if (input.numel() == 0) return {output, mask};
  STD_TORCH_CHECK(!low.data() == !high.data(), "running_min and running_max must both be given, or neither");
  const cpu::FakeQuantize job = {.geometry = &g,
                                 .element = element,
                                 .input = x.data(),
                                 .output = output.mutable_data_ptr(),
                                 .mask = bytes_of(mask),
                                 .affine = config.affine(scale.as<float>(), zero_point.as<int32_t>(), minval.as<float>())};
  const AfterRange after = {
      .element = element,
      .is_step = true,
      .chooses = true,
      .update = config.update_rule(has_running && low.data() && high.data(), type),
      .rule = config.qparams_rule(element),
      .out = {.scale = scale.as<float>(), .zero_point = zero_point.as<int32_t>(), .minval = minval.as<float>()},
      .kept_low = low.data(),
      .kept_high = high.data()};
  const int pack = element == Element::kFloat32 ? 4 : 8;
  const bool aligned = is_aligned(job.input) && is_aligned(job.output);
  const StepWay way = way_of_step(g, after.rule, pack, aligned);
  const auto plan = plan_observe(g, pack, aligned, most_blocks(device));
  const Tensor workspace = empty_beside(input, one_axis(workspace_of_step(g, way, plan)), ScalarType::Float);
  const auto stream = current_stream(device);
  queue_step(job, after, way, plan, static_cast<float*>(workspace.mutable_data_ptr()), most_blocks(device), stream);
  if (way == StepWay::kOneByOne) queue_simulation(job, most_blocks(device), stream);
  check_launch("observe_and_fake_quantize");
  for (BlockState* one : {&scale, &zero_point, &minval, &low, &high}) one->write_back();
  return {output, mask};
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
  const DeviceGuard guard(input.get_device_index());
  const Ints grid = grid_of(to_ints(input.sizes()), block_size);
  const auto fresh = [&](ScalarType type) { return empty_beside(input, grid, type); };
  const Tensor scale = fresh(ScalarType::Float), zero_point = fresh(ScalarType::Int), minval = fresh(ScalarType::Float);
  Tensor low = fresh(input.scalar_type()), high = fresh(input.scalar_type());
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

COREAI_REGISTER(COREAI_GPU_LIBRARY, library) {
  library.impl("observe_and_fake_quantize", TORCH_BOX(&observe_and_fake_quantize));
  library.impl("observe_and_fake_quantize_", TORCH_BOX(&observe_and_fake_quantize_));
  library.impl("observe_and_fake_quantize_unpacked_", TORCH_BOX(&observe_and_fake_quantize_unpacked_));
}

}  // namespace
}  // namespace coreai::cuda
