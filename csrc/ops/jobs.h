// Tensors made ready for a kernel, and what it left behind put in place: the same for one tensor and for lists.
// Constructors check; run() does nothing but compute, on any thread. Jobs are small, for there may be hundreds: the
// layout, which tensors of one shape share, is the caller's, who keeps it and the operand's output.
#pragma once

#include "ops/quant_config.h"

namespace coreai {
namespace {

// Quantize and dequantize with parameters given. Not float64.
class FakeQuantizeJob {
 public:
  FakeQuantizeJob(const Operand& x, const cpu::Layout& layout, const Tensor& scale, const Optional& zero_point,
                  const Optional& minval, int64_t format, double quant_min, double quant_max, uint8_t* mask)
      : values_(layout, scale, zero_point, minval, format, quant_min, quant_max),
        job_{.geometry = &layout.geometry,
             .element = element_of("input", x.output),
             .input = x.data,
             .output = x.output.mutable_data_ptr(),
             .mask = mask,
             .affine = values_.affine} {}
  FakeQuantizeJob(const FakeQuantizeJob&) = delete;

  int64_t numel() const { return job_.geometry->numel; }
  void run() const {
    if (numel() > 0) cpu::kernels().fake_quantize(job_);
  }
  // The same on other tensors, which lie in memory as the operand does and are not empty.
  void run_on(const void* input, void* output, uint8_t* mask) const {
    cpu::FakeQuantize job = job_;
    job.input = input;
    job.output = output;
    job.mask = mask;
    cpu::kernels().fake_quantize(job);
  }
  void write_back() {}

 private:
  AffineValues values_;
  cpu::FakeQuantize job_;
};

// Gradient through a packed mask. Not float64.
class MaskedGradientJob {
 public:
  // `order`: the axes from the outermost in memory to the innermost. `output`: empty_in_order(grad, order).
  MaskedGradientJob(const Tensor& grad, const Ints& order, const uint8_t* mask, Tensor& output)
      : numel_(grad.numel()), element_(element_of("grad", grad)), mask_(mask) {
    const bool dense = is_dense(to_ints(grad.sizes()), to_ints(grad.strides()), order);
    if (!dense) torch::stable::copy_(output, grad);
    source_ = dense ? grad.const_data_ptr() : output.const_data_ptr();
    target_ = output.mutable_data_ptr();
  }
  // In place.
  MaskedGradientJob(Tensor& grad, const Ints& order, const uint8_t* mask)
      : numel_(grad.numel()),
        element_(element_of("grad", grad)),
        mask_(mask),
        source_(grad.const_data_ptr()),
        target_(grad.mutable_data_ptr()) {
    STD_TORCH_CHECK(is_dense(to_ints(grad.sizes()), to_ints(grad.strides()), order),
                    "grad must lie in memory as order says, to be masked in place");
  }

  static Tensor empty_in_order(const Tensor& grad, const Ints& order) {
    const Ints shape = to_ints(grad.sizes());
    STD_TORCH_CHECK(order.size() == shape.size(), "order must name each of the ", shape.size(), " axes once");
    Ints strides(shape.size(), 1);
    int64_t stride = 1;
    for (size_t i = order.size(); i-- > 0;) {
      strides[static_cast<size_t>(order[i])] = stride;
      stride *= std::max<int64_t>(1, shape[static_cast<size_t>(order[i])]);
    }
    return empty(shape, strides, grad.scalar_type());
  }

  int64_t numel() const { return numel_; }
  void run() const {
    if (numel_ > 0) cpu::kernels().masked_gradient(element_, source_, target_, mask_, numel_);
  }
  void write_back() {}

 private:
  int64_t numel_;
  Element element_;
  const uint8_t* mask_;
  const void* source_;
  void* target_;
};

struct StepState {
  Tensor scale;
  Optional zero_point, minval, running_min, running_max;
};

// The whole step of a fake quantizer. Not float64.
class StepJob {
 public:
  // `has_running`: whether the running range holds one already.
  StepJob(const Operand& x, const cpu::Layout& layout, StepState state, const QuantConfig& config, bool has_running,
          uint8_t* mask)
      : state_(with_parameters(std::move(state), config, layout)),
        scale_(checked("scale", state_.scale, ScalarType::Float, layout), layout.block_index, false),
        low_("running_min", state_.running_min, x.output.scalar_type(), layout, has_running),
        high_("running_max", state_.running_max, x.output.scalar_type(), layout, has_running) {
    STD_TORCH_CHECK(state_.running_min.has_value() == state_.running_max.has_value(),
                    "running_min and running_max must both be given, or neither");
    if (state_.zero_point) {
      zero_point_.emplace(checked("zero_point", *state_.zero_point, ScalarType::Int, layout), layout.block_index, false);
    }
    if (state_.minval) {
      minval_.emplace(checked("minval", *state_.minval, ScalarType::Float, layout), layout.block_index, false);
    }
    const ScalarType type = x.output.scalar_type();
    const Element element = element_of("input", x.output);
    job_ = {
        .quantize = {.geometry = &layout.geometry,
                     .element = element,
                     .input = x.data,
                     .output = x.output.mutable_data_ptr(),
                     .mask = mask,
                     .affine = config.affine(scale_.data(), data_or_null(zero_point_), data_or_null(minval_))},
        .rule = config.qparams_rule(element),
        .update = config.update_rule(has_running && low_.data() && high_.data(), type),
        .out = {.scale = scale_.data(), .zero_point = data_or_null(zero_point_), .minval = data_or_null(minval_)},
        .running_low = low_.data(),
        .running_high = high_.data(),
        .running = low_.element(),
    };
  }
  StepJob(const StepJob&) = delete;

  int64_t numel() const { return job_.quantize.geometry->numel; }
  void run() const {
    if (numel() > 0) cpu::kernels().observe_and_fake_quantize(job_);
  }
  // The same on other tensors, which lie in memory as the operand does and are not empty.
  void run_on(const void* input, void* output, uint8_t* mask) const {
    cpu::Observe job = job_;
    job.quantize.input = input;
    job.quantize.output = output;
    job.quantize.mask = mask;
    cpu::kernels().observe_and_fake_quantize(job);
  }
  void write_back() {
    if (numel() == 0) return;
    scale_.write_back();
    if (zero_point_) zero_point_->write_back();
    if (minval_) minval_->write_back();
    low_.write_back();
    high_.write_back();
  }

 private:
  // The kernels read back what they choose: they get room where the caller keeps nothing.
  static StepState with_parameters(StepState state, const QuantConfig& config, const cpu::Layout& layout) {
    if (config.format != Format::kInt) return state;
    Optional& needed = config.use_minval ? state.minval : state.zero_point;
    const ScalarType type = config.use_minval ? ScalarType::Float : ScalarType::Int;
    if (!needed) needed = empty(one_axis(layout.geometry.blocks), type);
    return state;
  }
  static const Tensor& checked(const char* name, const Tensor& values, ScalarType type, const cpu::Layout& layout) {
    check_block_values(name, values, type, layout.geometry.blocks);
    return values;
  }

  StepState state_;
  BlockValues<float> scale_;
  std::optional<BlockValues<int32_t>> zero_point_;
  std::optional<BlockValues<float>> minval_;
  RunningValues low_, high_;
  cpu::Observe job_;
};

}  // namespace
}  // namespace coreai
