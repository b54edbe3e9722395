// The table of kernels of the level in COREAI_LEVEL. Included once by each kernels_<level>.cpp.
#pragma once

#include "cpu/observe_and_fake_quantize.h"
#include "cpu/palettes.h"
#include "cpu/quantize.h"

namespace coreai::cpu::COREAI_LEVEL {

extern const Kernels kKernels;
const Kernels kKernels = {
    fake_quantize, masked_gradient, observe_range, choose_qparams, observe_and_fake_quantize, quantize, dequantize,
    kPaletteKernels,
};

}  // namespace coreai::cpu::COREAI_LEVEL
