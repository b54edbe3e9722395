// Registration of the inner loop of GPTQ.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/tensors.h"

namespace coreai {
namespace {

std::tuple<Tensor, Tensor> gptq_columns(const Tensor& columns, const Tensor& factor, const Tensor& scale,
                                        const Optional& zero_point, const Optional& minval, const Blocks& groups,
                                        int64_t format, double quant_min, double quant_max) {
  const Ints shape = to_ints(columns.sizes());
  STD_TORCH_CHECK(shape.size() == 2 && columns.is_cpu(), "columns must have two axes, on the CPU");
  const int64_t n = shape[0], rows = shape[1];
  STD_TORCH_CHECK(n <= cpu::GptqColumns::kMaxColumns, "there must be at most ", cpu::GptqColumns::kMaxColumns,
                  " columns at a time; got ", n);
  STD_TORCH_CHECK(factor.dim() == 2 && factor.size(0) == n && factor.size(1) == n, "factor must have shape [", n, ", ", n,
                  "]");
  STD_TORCH_CHECK(static_cast<int64_t>(groups.size()) == n, "groups must have one entry a column, that is ", n);
  const auto is_float32 = [](const Tensor& x) { return x.is_cpu() && x.scalar_type() == ScalarType::Float; };
  STD_TORCH_CHECK(is_float32(columns) && is_float32(factor), "columns and factor must be float32 on the CPU");
  STD_TORCH_CHECK(scale.dim() == 2 && scale.size(1) == rows, "scale must have shape [groups, ", rows, "]");
  for (const int64_t group : groups) {
    STD_TORCH_CHECK(0 <= group && group < scale.size(0), "groups must be rows of scale; got ", group);
  }
  Tensor output = empty(shape, ScalarType::Float), errors = empty(shape, ScalarType::Float);
  if (n == 0 || rows == 0) return {output, errors};
  const Tensor x = torch::stable::contiguous(columns), u = torch::stable::contiguous(factor);
  cpu::Layout layout;
  layout.geometry.blocks = scale.numel();
  const AffineValues values(layout, scale, zero_point, minval, format, quant_min, quant_max);
  cpu::kernels().gptq_columns(
      {n, rows, static_cast<const float*>(x.const_data_ptr()), static_cast<const float*>(u.const_data_ptr()), groups.data(),
       static_cast<float*>(output.mutable_data_ptr()), static_cast<float*>(errors.mutable_data_ptr()), values.affine});
  return {output, errors};
}

STABLE_TORCH_LIBRARY_IMPL(coreai_kernels, CPU, library) { COREAI_IMPL("gptq_columns", &gptq_columns); }

}  // namespace
}  // namespace coreai
