// Registration of the CPU kernels with torch's dispatcher, through the stable ABI.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/bits.h"
#include "cpu/dispatch.h"
#include "tensors.h"

namespace coreai {
namespace {

std::tuple<Tensor, Tensor> fake_quantize(Tensor input, Tensor scale, Optional zero_point, Optional minval,
                                         Blocks block_size, int64_t format, double quant_min, double quant_max,
                                         bool with_mask) {
  if (is_double(input)) {
    const auto [output, bits] = fake_quantize(to_float(input), scale, zero_point, minval, block_size, format, quant_min,
                                              quant_max, with_mask);
    return {to_double(output), bits};
  }
  Operand x(input, input.scalar_type());
  const auto layout = cpu::make_layout(x.shape, x.order, block_size);
  const AffineValues values(layout, scale, zero_point, minval, format, quant_min, quant_max);
  const Tensor mask = empty_mask(layout.geometry.numel, with_mask);
  if (layout.geometry.numel > 0) {
    cpu::kernels().fake_quantize({&layout.geometry, element_of("input", input), x.data, x.output.mutable_data_ptr(),
                                  bytes_of(mask), values.affine});
  }
  return {x.output, mask};
}

Tensor fake_quantize_backward(Tensor grad, Tensor mask, std::vector<int64_t> axes) {
  if (is_double(grad)) return to_double(fake_quantize_backward(to_float(grad), mask, axes));
  const Ints shape = to_ints(grad.sizes());
  const Ints order = axes.empty() ? natural_order(shape.size()) : Ints(axes.data(), axes.data() + axes.size());
  STD_TORCH_CHECK(order.size() == shape.size(), "order must name each of the ", shape.size(), " axes once");
  STD_TORCH_CHECK(mask.numel() == (grad.numel() + 7) / 8, "mask must have one bit per element of grad: ",
                  (grad.numel() + 7) / 8, " bytes; it has ", mask.numel());
  Ints strides(shape.size(), 1);
  int64_t stride = 1;
  for (size_t i = order.size(); i-- > 0;) {
    strides[static_cast<size_t>(order[i])] = stride;
    stride *= std::max<int64_t>(1, shape[static_cast<size_t>(order[i])]);
  }
  Tensor output = empty(shape, strides, grad.scalar_type());
  const Tensor* source = &grad;
  if (!is_dense(shape, to_ints(grad.strides()), order)) {
    torch::stable::copy_(output, grad);
    source = &output;
  }
  if (grad.numel() > 0) {
    cpu::kernels().masked_gradient(element_of("grad", grad), source->const_data_ptr(), output.mutable_data_ptr(),
                                   static_cast<const uint8_t*>(mask.const_data_ptr()), grad.numel());
  }
  return output;
}

// float32 values, in memory order of the blocks, to a row-major tensor of the input's type.
Tensor block_tensor(const std::vector<float>& values, const cpu::Layout& layout, const Ints& grid, ScalarType type) {
  Tensor result = empty(grid, ScalarType::Float);
  auto* data = static_cast<float*>(result.mutable_data_ptr());
  for (size_t i = 0; i < values.size(); ++i) data[layout.block_index.empty() ? i : layout.block_index[i]] = values[i];
  return type == ScalarType::Float ? result : torch::stable::to(result, type);
}

std::tuple<Tensor, Tensor> observe_range(Tensor input, Blocks block_size) {
  if (is_double(input)) {
    const auto [low, high] = observe_range(to_float(input), block_size);
    return {to_double(low), to_double(high)};
  }
  Operand x(input, input.scalar_type());
  const auto layout = cpu::make_layout(x.shape, x.order, block_size);
  std::vector<float> low(static_cast<size_t>(layout.geometry.blocks)), high(low.size());
  if (input.numel() > 0) cpu::kernels().observe_range({&layout.geometry, element_of("input", input), x.data, low.data(), high.data()});
  const Ints grid = grid_of(x.shape, block_size);
  return {block_tensor(low, layout, grid, input.scalar_type()), block_tensor(high, layout, grid, input.scalar_type())};
}

// Intermediate results have the wider type of the two bounds; two different narrow ones meet in float32.
Element common_element(const Tensor& low, const Tensor& high) {
  const Element a = element_of("min_val", low), b = element_of("max_val", high);
  return a == b && a != Element::kFloat64 ? a : Element::kFloat32;
}

std::tuple<Tensor, Tensor, Tensor> choose_qparams(Tensor min_val, Tensor max_val, int64_t scheme, int64_t format,
                                                  double quant_min, double quant_max, bool power_of_two) {
  STD_TORCH_CHECK(min_val.numel() == max_val.numel(), "min_val and max_val must have one shape");
  const cpu::QParamsRule rule = {static_cast<Scheme>(scheme), static_cast<Format>(format), quant_min, quant_max,
                                 power_of_two, common_element(min_val, max_val)};
  const Tensor low = as_float32(min_val), high = as_float32(max_val);
  const Ints shape = to_ints(min_val.sizes());
  const Tensor scale = empty(shape, ScalarType::Float), zero_point = empty(shape, ScalarType::Int),
               minval = empty(shape, ScalarType::Float);
  cpu::kernels().choose_qparams(rule, static_cast<const float*>(low.const_data_ptr()),
                                static_cast<const float*>(high.const_data_ptr()), min_val.numel(),
                                {static_cast<float*>(scale.mutable_data_ptr()),
                                 static_cast<int32_t*>(zero_point.mutable_data_ptr()),
                                 static_cast<float*>(minval.mutable_data_ptr())});
  return {scale, zero_point, minval};
}

std::tuple<Tensor, Tensor> observe_and_fake_quantize_(
    Tensor input, Tensor scale, Optional zero_point, Optional minval, Optional running_min, Optional running_max,
    bool has_running, Blocks block_size, int64_t scheme, int64_t format, double quant_min, double quant_max,
    bool use_minval, int64_t update, double averaging_constant, std::optional<double> range_min,
    std::optional<double> range_max, bool power_of_two, bool with_mask) {
  if (is_double(input)) {
    const Optional low = to_float(running_min), high = to_float(running_max);
    const auto [output, bits] = observe_and_fake_quantize_(
        to_float(input), scale, zero_point, minval, low, high, has_running, block_size, scheme, format, quant_min,
        quant_max, use_minval, update, averaging_constant, range_min, range_max, power_of_two, with_mask);
    if (running_min) torch::stable::copy_(*running_min, *low);
    if (running_max) torch::stable::copy_(*running_max, *high);
    return {to_double(output), bits};
  }
  const ScalarType type = input.scalar_type();
  Operand x(input, type);
  const auto layout = cpu::make_layout(x.shape, x.order, block_size);
  const int64_t blocks = layout.geometry.blocks;
  const Tensor mask = empty_mask(layout.geometry.numel, with_mask);
  const bool is_int = format == static_cast<int64_t>(Format::kInt);
  // The kernels read back what they choose: give them room where the caller keeps nothing.
  if (is_int && use_minval && !minval) minval = empty(one_axis(blocks), ScalarType::Float);
  if (is_int && !use_minval && !zero_point) zero_point = empty(one_axis(blocks), ScalarType::Int);

  check_block_values("scale", scale, ScalarType::Float, blocks);
  BlockValues<float> scales(scale, layout.block_index, false);
  std::optional<BlockValues<int32_t>> zero_points;
  std::optional<BlockValues<float>> minvals;
  if (zero_point) {
    check_block_values("zero_point", *zero_point, ScalarType::Int, blocks);
    zero_points.emplace(*zero_point, layout.block_index, false);
  }
  if (minval) {
    check_block_values("minval", *minval, ScalarType::Float, blocks);
    minvals.emplace(*minval, layout.block_index, false);
  }
  RunningValues low("running_min", running_min, type, layout, has_running);
  RunningValues high("running_max", running_max, type, layout, has_running);
  const Element element = element_of("input", input);
  const cpu::Affine affine = {static_cast<Format>(format),
                              static_cast<float>(quant_min),
                              static_cast<float>(quant_max),
                              scales.data(),
                              is_int && !use_minval ? data_or_null(zero_points) : nullptr,
                              is_int && use_minval ? data_or_null(minvals) : nullptr,
                              is_int && use_minval ? static_cast<float>(quant_min) : 0.0f};
  if (input.numel() == 0) return {x.output, mask};
  cpu::kernels().observe_and_fake_quantize(
      {{&layout.geometry, element, x.data, x.output.mutable_data_ptr(), bytes_of(mask), affine},
       {static_cast<Scheme>(scheme), static_cast<Format>(format), quant_min, quant_max, power_of_two, element},
       {static_cast<RangeUpdate>(update), has_running && low.data() && high.data(),
        static_cast<float>(averaging_constant), static_cast<float>(1.0 - averaging_constant), range_min.has_value(),
        range_max.has_value(), rounded_to(range_min.value_or(0), type), rounded_to(range_max.value_or(0), type)},
       {scales.data(), data_or_null(zero_points), data_or_null(minvals)},
       low.data(),
       high.data()});
  scales.write_back();
  if (zero_points) zero_points->write_back();
  if (minvals) minvals->write_back();
  low.write_back();
  high.write_back();
  return {x.output, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> observe_and_fake_quantize(
    Tensor input, Optional running_min, Optional running_max, Blocks block_size, int64_t scheme, int64_t format,
    double quant_min, double quant_max, bool use_minval, int64_t update, double averaging_constant,
    std::optional<double> range_min, std::optional<double> range_max, bool power_of_two, bool with_mask) {
  const Ints grid = grid_of(to_ints(input.sizes()), block_size);
  const Tensor scale = empty(grid, ScalarType::Float), zero_point = empty(grid, ScalarType::Int),
               minval = empty(grid, ScalarType::Float);
  Tensor low = empty(grid, input.scalar_type()), high = empty(grid, input.scalar_type());
  const bool has_running = running_min && running_max;
  if (has_running) {
    torch::stable::copy_(low, *running_min);
    torch::stable::copy_(high, *running_max);
  }
  const auto [output, mask] = observe_and_fake_quantize_(
      input, scale, zero_point, minval, low, high, has_running, block_size, scheme, format, quant_min, quant_max,
      use_minval, update, averaging_constant, range_min, range_max, power_of_two, with_mask);
  return {output, mask, scale, zero_point, minval, low, high};
}

Tensor quantize(Tensor input, Tensor scale, Optional zero_point, Optional minval, Blocks block_size, int64_t format,
                double quant_min, double quant_max, ScalarType dtype) {
  Operand x(input, dtype);
  const auto layout = cpu::make_layout(x.shape, x.order, block_size);
  const AffineValues values(layout, scale, zero_point, minval, format, quant_min, quant_max);
  if (layout.geometry.numel > 0) {
    cpu::kernels().quantize({&layout.geometry, x.data, x.output.mutable_data_ptr(), values.affine,
                             element_of("input", input), storage_of("dtype", dtype)});
  }
  return x.output;
}

Tensor dequantize(Tensor input, Tensor scale, Optional zero_point, Optional minval, Blocks block_size, int64_t format,
                  double quant_min, ScalarType dtype) {
  Operand x(input, dtype);
  const auto layout = cpu::make_layout(x.shape, x.order, block_size);
  const AffineValues values(layout, scale, zero_point, minval, format, quant_min, 0.0);
  if (layout.geometry.numel > 0) {
    cpu::kernels().dequantize({&layout.geometry, x.data, x.output.mutable_data_ptr(), values.affine,
                               element_of("dtype", x.output), storage_of("input", input.scalar_type())});
  }
  return x.output;
}

Tensor pack_bits(Tensor values, int64_t bits) {
  const Tensor dense = torch::stable::contiguous(values);
  const int64_t numel = dense.numel();
  const Tensor packed = empty(one_axis((numel * bits + 7) / 8), ScalarType::Byte);
  cpu::pack_bits(static_cast<const uint8_t*>(dense.const_data_ptr()), numel, static_cast<int>(bits),
                 static_cast<uint8_t*>(packed.mutable_data_ptr()));
  return packed;
}

Tensor unpack_bits(Tensor packed, int64_t bits, int64_t numel, bool is_signed) {
  const Tensor dense = torch::stable::contiguous(packed);
  const Tensor values = empty(one_axis(numel), is_signed ? ScalarType::Char : ScalarType::Byte);
  cpu::unpack_bits(static_cast<const uint8_t*>(dense.const_data_ptr()), numel, static_cast<int>(bits), is_signed,
                   static_cast<uint8_t*>(values.mutable_data_ptr()));
  return values;
}

STABLE_TORCH_LIBRARY_IMPL(coreai_kernels, CPU, library) {
  library.impl("fake_quantize", TORCH_BOX(&fake_quantize));
  library.impl("fake_quantize_forward", TORCH_BOX(&fake_quantize));
  library.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward));
  library.impl("observe_range", TORCH_BOX(&observe_range));
  library.impl("choose_qparams", TORCH_BOX(&choose_qparams));
  library.impl("observe_and_fake_quantize", TORCH_BOX(&observe_and_fake_quantize));
  library.impl("observe_and_fake_quantize_", TORCH_BOX(&observe_and_fake_quantize_));
  library.impl("quantize", TORCH_BOX(&quantize));
  library.impl("dequantize", TORCH_BOX(&dequantize));
  library.impl("pack_bits", TORCH_BOX(&pack_bits));
  library.impl("unpack_bits", TORCH_BOX(&unpack_bits));
}

}  // namespace

namespace cpu {

const Kernels& kernels() {
  switch (level()) {
#if defined(COREAI_HAVE_AVX512)
    case Level::avx512:
      return avx512::kKernels;
#endif
#if defined(COREAI_HAVE_AVX2)
    case Level::avx2:
      return avx2::kKernels;
#endif
    default:
      return generic::kKernels;
  }
}

void parallel(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

int64_t threads() { return torch::stable::get_num_threads(); }

}  // namespace cpu
}  // namespace coreai
