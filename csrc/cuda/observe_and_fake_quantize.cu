// observe_and_fake_quantize for CUDA tensors, in its three forms. The kernels are in cuda/quantize.
#include "cuda/captured.cuh"
#include "cuda/quantize/held_steps.cuh"

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
      : tensor_(tensor) {
    if (!tensor) return;
    STD_TORCH_CHECK(tensor->is_contiguous(), name, " must be contiguous");
    values_ = in_memory_order(name, *tensor, type, x, layout, block);
  }
  void* data() const { return values_ ? values_->mutable_data_ptr() : nullptr; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data());
  }
  void write_back(const DeviceInput& x, const cpu::Layout& layout, const Blocks& block) {
    if (!values_ || layout.block_index.empty()) return;
    const Tensor found = in_row_major(*values_, x, layout, block);
    const Ints shape = to_ints(tensor_->sizes());
    torch::stable::copy_(*tensor_, torch::stable::reshape(found, {shape.data(), shape.size()}));
  }

 private:
  Optional tensor_, values_;
};

// Whether the kernels read back what they choose and the caller does not keep.
bool lacks_room(const StepState& state, const QuantConfig& config) {
  return (config.uses_zero_point() && !state.zero_point) || (config.uses_minval() && !state.minval);
}

// The whole step of a fake quantizer. Not float64.
class Step {
 public:
  // `layout` is the caller's, who keeps it. `has_running`: whether the running range holds one already.
  Step(const DeviceInput& x, const cpu::Layout& layout, const Blocks& block_size, const StepState& state,
       const QuantConfig& config, bool has_running)
      : place_(Place::of(x.dense)),
        scale_("scale", state.scale, ScalarType::Float, x, layout, block_size),
        zero_point_("zero_point", or_room(state.zero_point, config.uses_zero_point(), ScalarType::Int, layout),
                    ScalarType::Int, x, layout, block_size),
        minval_("minval", or_room(state.minval, config.uses_minval(), ScalarType::Float, layout), ScalarType::Float, x,
                layout, block_size),
        low_("running_min", state.running_min, x.dense.scalar_type(), x, layout, block_size),
        high_("running_max", state.running_max, x.dense.scalar_type(), x, layout, block_size) {
    STD_TORCH_CHECK(!low_.data() == !high_.data(), "running_min and running_max must both be given, or neither");
    const ScalarType type = x.dense.scalar_type();
    const Element element = element_of("input", x.dense);
    job_ = {.geometry = &layout.geometry,
            .element = element,
            .input = nullptr,
            .output = nullptr,
            .mask = nullptr,
            .affine = config.affine(scale_.as<float>(), zero_point_.as<int32_t>(), minval_.as<float>())};
    after_ = {.element = element,
              .is_step = true,
              .chooses = true,
              .update = config.update_rule(has_running && low_.data() && high_.data(), type),
              .rule = config.qparams_rule(element),
              .out = {.scale = scale_.as<float>(), .zero_point = zero_point_.as<int32_t>(), .minval = minval_.as<float>()},
              .kept_low = low_.data(),
              .kept_high = high_.data()};
  }
  Step(const Step&) = delete;

  // Of tensors that lie in memory as `x` does, on its device, which is the current one.
  void run_on(const void* input, void* output, uint8_t* mask) const {
    const cpu::Geometry& g = *job_.geometry;
    if (g.numel == 0) return;
    cpu::FakeQuantize job = job_;
    job.input = input;
    job.output = output;
    job.mask = mask;
    const int pack = job.element == Element::kFloat32 ? 4 : 8;
    const bool aligned = is_aligned(input) && is_aligned(output);
    const int64_t most = most_blocks(place_.device);
    const StepWay way = way_of_step(g, after_.rule, pack, aligned);
    const auto stream = current_stream(place_.device);
    const HeldPlan held = plan_held(job, after_, way, aligned, place_.device, multiprocessors(place_.device));
    if (held.blocks > 0) {
      const Optional workspace = workspace_of(held.workspace);
      if (queue_held(job, after_, held, data_of<float>(workspace), stream)) {
        return check_launch("observe_and_fake_quantize");
      }
    }
    const auto plan = plan_observe(g, pack, aligned, most);
    const Optional workspace = workspace_of(workspace_of_step(g, way, plan));
    queue_step(job, after_, way, plan, data_of<float>(workspace), most, stream);
    if (way == StepWay::kOneByOne) queue_simulation(job, most, stream);
    check_launch("observe_and_fake_quantize");
  }
  void write_back(const DeviceInput& x, const cpu::Layout& layout, const Blocks& block) {
    if (x.dense.numel() == 0) return;
    for (BlockState* one : {&scale_, &zero_point_, &minval_, &low_, &high_}) one->write_back(x, layout, block);
  }

 private:
  Optional or_room(const Optional& values, bool needed, ScalarType type, const cpu::Layout& layout) const {
    if (values || !needed) return values;
    return empty_at(place_, one_axis(layout.geometry.blocks), one_axis(1), type);
  }

  // Free for others when the kernels have been queued: who gets it queues on the same stream behind them.
  Optional workspace_of(int64_t numbers) const {
    if (numbers == 0) return std::nullopt;
    return empty_at(place_, one_axis(numbers), one_axis(1), ScalarType::Float);
  }

  Place place_;
  BlockState scale_, zero_point_, minval_, low_, high_;
  cpu::FakeQuantize job_;
  AfterRange after_;
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
  const DeviceGuard guard(input.get_device_index());
  const DeviceInput x(input);
  const Tensor output = x.output(input.scalar_type()), mask = empty_mask_beside(input, with_mask);
  const auto layout = cpu::make_layout(x.shape, x.order, config.block_size);
  Step job(x, layout, config.block_size, state, config, has_running);
  job.run_on(x.data(), output.mutable_data_ptr(), bytes_of(mask));
  job.write_back(x, layout, config.block_size);
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

CapturedCall* capture_step(AtenTensorHandle input, const AtenTensorHandle (&state)[5], bool has_running,
                           AtenTensorHandle packed_config) {
  const Tensor x(input), packed(packed_config);
  const StepState its = {Tensor(state[0]), owned(state[1]), owned(state[2]), owned(state[3]), owned(state[4])};
  const auto config = QuantConfig::unpacked(packed, x.dim());
  if (lacks_room(its, config)) return nullptr;
  return capture<Step>(x, config.block_size, its, config, has_running);
}

}  // namespace coreai::cuda
