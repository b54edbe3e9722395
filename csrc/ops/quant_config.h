// The settings of a fake quantizer: coreai_kernels/quant_config.py, in C++.
#pragma once

#include <cmath>
#include <optional>

#include "ops/tensors.h"

namespace coreai {
namespace {

struct QuantConfig {
  Blocks block_size;  // of a list of tensors those of all, in order
  Scheme scheme;
  Format format;
  double quant_min, quant_max;
  bool use_minval;
  RangeUpdate update;
  double averaging_constant;
  std::optional<double> range_min, range_max;
  ScaleFormat scale_format;

  bool uses_zero_point() const { return format == Format::kInt && !use_minval; }
  bool uses_minval() const { return format == Format::kInt && use_minval; }

  // What a kernel of steps is told. Parts of the state that the format does not use may be there; they are left out.
  cpu::Affine affine(const float* scale, const int32_t* zero_point, const float* minval) const {
    return {.format = format,
            .low = static_cast<float>(quant_min),
            .high = static_cast<float>(quant_max),
            .scale = scale,
            .zero_point = uses_zero_point() ? zero_point : nullptr,
            .offset = uses_minval() ? minval : nullptr,
            .constant = uses_minval() ? static_cast<float>(quant_min) : 0.0f};
  }
  UpdateRule update_rule(bool has_running, ScalarType type) const {
    return {.update = update,
            .has_running = has_running,
            .constant = static_cast<float>(averaging_constant),
            .one_minus_constant = static_cast<float>(1.0 - averaging_constant),
            .fix_low = range_min.has_value(),
            .fix_high = range_max.has_value(),
            .low = rounded_to(range_min.value_or(0), type),
            .high = rounded_to(range_max.value_or(0), type)};
  }
  QParamsRule qparams_rule(Element element) const {
    return QParamsRule::of(scheme, format, quant_min, quant_max, scale_format, element);
  }

  // From an operator's arguments, in the order of QuantConfig.SCHEMA.
  static QuantConfig of(Blocks block_size, int64_t scheme, int64_t format, double quant_min, double quant_max,
                        bool use_minval, int64_t update, double averaging_constant, std::optional<double> range_min,
                        std::optional<double> range_max, int64_t scale_format) {
    return {.block_size = std::move(block_size),
            .scheme = static_cast<Scheme>(scheme),
            .format = static_cast<Format>(format),
            .quant_min = quant_min,
            .quant_max = quant_max,
            .use_minval = use_minval,
            .update = static_cast<RangeUpdate>(update),
            .averaging_constant = averaging_constant,
            .range_min = range_min,
            .range_max = range_max,
            .scale_format = static_cast<ScaleFormat>(scale_format)};
  }

  // From what QuantConfig.packed() made: the fields but for the block size in order, then the block's extents.
  static QuantConfig unpacked(const Tensor& packed, int64_t axes) {
    enum Field {
      kScheme,
      kFormat,
      kQuantMin,
      kQuantMax,
      kUseMinval,
      kUpdate,
      kConstant,
      kRangeMin,
      kRangeMax,
      kScaleFormat,
      kFields
    };
    STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Double && packed.is_contiguous() &&
                        packed.numel() == kFields + axes,
                    "config must be ", static_cast<int>(kFields),
                    " numbers and an extent for each axis, float64 on the CPU");
    const auto* value = static_cast<const double*>(packed.const_data_ptr());
    const auto integer = [&](int64_t i) { return static_cast<int64_t>(value[i]); };
    const auto bound = [&](int i) { return std::isnan(value[i]) ? std::nullopt : std::optional<double>(value[i]); };
    Blocks block_size(static_cast<size_t>(axes));
    for (int64_t i = 0; i < axes; ++i) block_size[static_cast<size_t>(i)] = integer(kFields + i);
    return of(std::move(block_size), integer(kScheme), integer(kFormat), value[kQuantMin], value[kQuantMax],
              value[kUseMinval] != 0.0, integer(kUpdate), value[kConstant], bound(kRangeMin), bound(kRangeMax),
              integer(kScaleFormat));
  }
};

}  // namespace
}  // namespace coreai
