// Conversion to quantized values and back.
#include <torch/csrc/stable/library.h>

#include "ops/quant_config.h"

namespace coreai {
namespace {

Tensor quantize(const Tensor& input, const Tensor& scale, const Optional& zero_point, const Optional& minval,
                const Blocks& block_size, int64_t format, double quant_min, double quant_max, ScalarType dtype) {
  Operand x(input, dtype);
  const auto layout = cpu::make_layout(x.shape, x.order, block_size);
  const AffineValues values(layout, scale, zero_point, minval, format, quant_min, quant_max);
  if (layout.geometry.numel > 0) {
    cpu::kernels().quantize({&layout.geometry, x.data, x.output.mutable_data_ptr(), values.affine,
                             element_of("input", input), storage_of("dtype", dtype)});
  }
  return x.output;
}

Tensor dequantize(const Tensor& input, const Tensor& scale, const Optional& zero_point, const Optional& minval,
                  const Blocks& block_size, int64_t format, double quant_min, ScalarType dtype) {
  Operand x(input, dtype);
  const auto layout = cpu::make_layout(x.shape, x.order, block_size);
  const AffineValues values(layout, scale, zero_point, minval, format, quant_min, 0.0);
  if (layout.geometry.numel > 0) {
    cpu::kernels().dequantize({&layout.geometry, x.data, x.output.mutable_data_ptr(), values.affine,
                               element_of("dtype", x.output), storage_of("input", input.scalar_type())});
  }
  return x.output;
}

STABLE_TORCH_LIBRARY_IMPL(coreai_kernels, CPU, library) {
  COREAI_IMPL("quantize", &quantize);
  COREAI_IMPL("dequantize", &dequantize);
}

}  // namespace
}  // namespace coreai
