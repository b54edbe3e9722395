// fake_quantize and its gradient for CUDA tensors: registration, memory, stream. The kernels are in cuda/quantize.
#include <torch/csrc/stable/library.h>

#include "cuda/captured.cuh"
#include "cuda/quantize/fake_quantize.cuh"
#include "cuda/quantize/masked_gradient.cuh"
#include "cuda/quantize/queue.h"
#include "cuda/tensors.cuh"

namespace coreai::cuda {

void queue_simulation(const cpu::FakeQuantize& job, int64_t most_blocks, Stream stream) {
  queue_fake_quantize(job, most_blocks, stream);
}

namespace {

// Quantize and dequantize with parameters given. Not float64.
class Simulation {
 public:
  // `layout` is the caller's, who keeps it.
  Simulation(const DeviceInput& x, const cpu::Layout& layout, const Blocks& block_size, const Tensor& scale,
             const Optional& zero_point, const Optional& minval, int64_t format, double quant_min, double quant_max)
      : device_(x.dense.get_device_index()) {
    const auto parameter = [&](const char* name, const Optional& values, ScalarType type) -> Optional {
      return values ? Optional(in_memory_order(name, *values, type, x, layout, block_size)) : std::nullopt;
    };
    scale_ = parameter("scale", scale, ScalarType::Float);
    zero_point_ = parameter("zero_point", zero_point, ScalarType::Int);
    minval_ = parameter("minval", minval, ScalarType::Float);
    job_ = {.geometry = &layout.geometry,
            .element = element_of("input", x.dense),
            .input = nullptr,
            .output = nullptr,
            .mask = nullptr,
            .affine = {.format = static_cast<Format>(format),
                       .low = static_cast<float>(quant_min),
                       .high = static_cast<float>(quant_max),
                       .scale = data_of<float>(scale_),
                       .zero_point = data_of<int32_t>(zero_point_),
                       .offset = data_of<float>(minval_),
                       .constant = minval ? static_cast<float>(quant_min) : 0.0f}};
  }
  Simulation(const Simulation&) = delete;

  // Of tensors that lie in memory as `x` does, on its device, which is the current one.
  void run_on(const void* input, void* output, uint8_t* mask) const {
    if (job_.geometry->numel == 0) return;
    cpu::FakeQuantize job = job_;
    job.input = input;
    job.output = output;
    job.mask = mask;
    queue_fake_quantize(job, most_blocks(device_), current_stream(device_));
    check_launch("fake_quantize");
  }

 private:
  int32_t device_;
  Optional scale_, zero_point_, minval_;
  cpu::FakeQuantize job_;
};

std::tuple<Tensor, Tensor> fake_quantize(const Tensor& input, const Tensor& scale, const Optional& zero_point,
                                         const Optional& minval, const Blocks& block_size, int64_t format, double quant_min,
                                         double quant_max, bool with_mask) {
  if (is_double(input)) {
    const auto [output, bits] =
        fake_quantize(to_float(input), scale, zero_point, minval, block_size, format, quant_min, quant_max, with_mask);
    return {to_double(output), bits};
  }
  const DeviceGuard guard(input.get_device_index());
  const DeviceInput x(input);
  const Tensor output = x.output(input.scalar_type());
  const Tensor mask = empty_mask_beside(input, with_mask);
  const auto layout = cpu::make_layout(x.shape, x.order, block_size);
  const Simulation job(x, layout, block_size, scale, zero_point, minval, format, quant_min, quant_max);
  job.run_on(x.data(), output.mutable_data_ptr(), bytes_of(mask));
  return {output, mask};
}

Ints order_of(const Tensor& x, const Blocks& axes) {
  const auto rank = static_cast<size_t>(x.dim());
  STD_TORCH_CHECK(axes.empty() || axes.size() == rank, "order must name each of the ", rank, " axes once");
  return axes.empty() ? natural_order(rank) : Ints(axes.data(), axes.data() + axes.size());
}

void run_masked_gradient(const Tensor& source, Tensor& target, const Tensor& mask) {
  STD_TORCH_CHECK(same_device(mask, source), "mask must be on the device of grad");
  STD_TORCH_CHECK(mask.numel() == (source.numel() + 7) / 8,
                  "mask must have one bit per element of grad: ", (source.numel() + 7) / 8, " bytes; it has ", mask.numel());
  if (source.numel() == 0) return;
  const int32_t device = source.get_device_index();
  queue_masked_gradient(element_of("grad", source), source.const_data_ptr(), target.mutable_data_ptr(),
                        static_cast<const uint8_t*>(mask.const_data_ptr()), source.numel(), most_blocks(device),
                        current_stream(device));
  check_launch("fake_quantize_backward");
}

Tensor fake_quantize_backward(const Tensor& grad, const Tensor& mask, const Blocks& axes) {
  if (is_double(grad)) return to_double(fake_quantize_backward(to_float(grad), mask, axes));
  const DeviceGuard guard(grad.get_device_index());
  const Ints order = order_of(grad, axes), shape = to_ints(grad.sizes());
  Ints strides(shape.size(), 1);
  int64_t stride = 1;
  for (size_t i = order.size(); i-- > 0;) {
    strides[static_cast<size_t>(order[i])] = stride;
    stride *= std::max<int64_t>(1, shape[static_cast<size_t>(order[i])]);
  }
  Tensor result = empty_beside(grad, shape, strides, grad.scalar_type());
  const bool dense = is_dense(shape, to_ints(grad.strides()), order);
  if (!dense) torch::stable::copy_(result, grad);
  run_masked_gradient(dense ? grad : result, result, mask);
  return result;
}

void fake_quantize_backward_(Tensor grad, const Tensor& mask, const Blocks& axes) {
  if (is_double(grad)) {
    torch::stable::copy_(grad, fake_quantize_backward(grad, mask, axes));
    return;
  }
  const DeviceGuard guard(grad.get_device_index());
  STD_TORCH_CHECK(is_dense(to_ints(grad.sizes()), to_ints(grad.strides()), order_of(grad, axes)),
                  "grad must lie in memory as order says, to be masked in place");
  run_masked_gradient(grad, grad, mask);
}

COREAI_REGISTER(COREAI_GPU_LIBRARY, library) {
  library.impl("fake_quantize", TORCH_BOX(&fake_quantize));
  library.impl("fake_quantize_forward", TORCH_BOX(&fake_quantize));
  library.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward));
  library.impl("fake_quantize_backward_", TORCH_BOX(&fake_quantize_backward_));
}

}  // namespace

CapturedCall* capture_simulation(AtenTensorHandle input, const AtenTensorHandle (&params)[3], const int64_t* block_size,
                                 size_t axes, int64_t format, double quant_min, double quant_max) {
  const Tensor x(input), scale(params[0]);
  const Optional zero_point = owned(params[1]), minval = owned(params[2]);
  return capture<Simulation>(x, Blocks(block_size, block_size + axes), scale, zero_point, minval, format, quant_min,
                             quant_max);
}

}  // namespace coreai::cuda
