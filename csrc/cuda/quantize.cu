// quantize and dequantize for CUDA tensors. The kernels are in cuda/quantize.
#include "cuda/quantize/quantize.cuh"

#include <torch/csrc/stable/library.h>

#include "cuda/tensors.cuh"

namespace coreai::cuda {
namespace {

template <bool kQuantizes>
Tensor convert(const char* name, const Tensor& input, const Tensor& scale, const Optional& zero_point,
               const Optional& minval, const Blocks& block_size, int64_t format, double quant_min, double quant_max,
               ScalarType dtype) {
  const int32_t device = input.get_device_index();
  const DeviceGuard guard(device);
  const DeviceInput x(input);
  const Tensor output = x.output(dtype);
  const auto layout = cpu::make_layout(x.shape, x.order, block_size);
  const auto parameter = [&](const char* its, const Optional& values, ScalarType type) -> Optional {
    return values ? Optional(in_memory_order(its, *values, type, x, layout, block_size)) : std::nullopt;
  };
  const Optional scales = parameter("scale", scale, ScalarType::Float);
  const Optional zero_points = parameter("zero_point", zero_point, ScalarType::Int);
  const Optional offsets = parameter("minval", minval, ScalarType::Float);
  const cpu::Convert job = {.geometry = &layout.geometry,
                            .input = x.data(),
                            .output = output.mutable_data_ptr(),
                            .affine = {.format = static_cast<Format>(format),
                                       .low = static_cast<float>(quant_min),
                                       .high = static_cast<float>(quant_max),
                                       .scale = data_of<float>(scales),
                                       .zero_point = data_of<int32_t>(zero_points),
                                       .offset = data_of<float>(offsets),
                                       .constant = minval ? static_cast<float>(quant_min) : 0.0f},
                            .element = kQuantizes ? element_of("input", input) : element_of("dtype", output),
                            .storage = kQuantizes ? storage_of("dtype", dtype) : storage_of("input", input.scalar_type())};
  if (input.numel() == 0) return output;
  queue_convert<kQuantizes>(job, current_stream(device));
  check_launch(name);
  return output;
}

Tensor quantize(const Tensor& input, const Tensor& scale, const Optional& zero_point, const Optional& minval,
                const Blocks& block_size, int64_t format, double quant_min, double quant_max, ScalarType dtype) {
  return convert<true>("quantize", input, scale, zero_point, minval, block_size, format, quant_min, quant_max, dtype);
}

Tensor dequantize(const Tensor& input, const Tensor& scale, const Optional& zero_point, const Optional& minval,
                  const Blocks& block_size, int64_t format, double quant_min, ScalarType dtype) {
  return convert<false>("dequantize", input, scale, zero_point, minval, block_size, format, quant_min, 0.0, dtype);
}

COREAI_REGISTER(COREAI_GPU_LIBRARY, library) {
  library.impl("quantize", TORCH_BOX(&quantize));
  library.impl("dequantize", TORCH_BOX(&dequantize));
}

}  // namespace
}  // namespace coreai::cuda
