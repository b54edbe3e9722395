// The table of kernels of the instruction set in COREAI_ISA. Included once by each kernels_<isa>.cpp.
#pragma once

#include "cpu/masks/apply_mask.h"
#include "cpu/masks/block_norms.h"
#include "cpu/masks/nm_mask.h"
#include "cpu/masks/sampled_mask.h"
#include "cpu/masks/topk_mask.h"
#include "cpu/palettes/palettes.h"
#include "cpu/quantize/by_reciprocal.h"
#include "cpu/quantize/gptq_columns.h"
#include "cpu/quantize/learnable_range.h"
#include "cpu/quantize/masked_gradient.h"
#include "cpu/quantize/observe_and_fake_quantize.h"
#include "cpu/quantize/quantize.h"

namespace coreai::cpu::COREAI_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {
    .apply_mask = apply_mask,
    .block_norms = block_norms,
    .fake_quantize = fake_quantize,
    .masked_gradient = masked_gradient,
    .observe_range = observe_range,
    .choose_qparams = choose_qparams,
    .observe_and_fake_quantize = observe_and_fake_quantize,
    .quantize = quantize,
    .dequantize = dequantize,
    .nm_mask = nm_mask,
    .topk_split = topk_split,
    .topk_write = topk_write,
    .sampled_mask = sampled_mask,
    .learnable_range = learnable_range,
    .gptq_columns = gptq_columns,
    .fake_quantize_by_reciprocal = fake_quantize_by_reciprocal,
    .by_reciprocal_backward = by_reciprocal_backward,
    .palettes = kPaletteKernels,
};

}  // namespace coreai::cpu::COREAI_ISA
