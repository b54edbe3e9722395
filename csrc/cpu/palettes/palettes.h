// The palette kernels of one instruction set.
#pragma once

#include "cpu/palettes/best_split.h"
#include "cpu/palettes/lookup.h"
#include "cpu/palettes/palettize.h"
#include "cpu/palettes/soft_palettize.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

constexpr PaletteKernels kPaletteKernels = {
    .best_split = best_split,
    .lookup = lookup,
    .palettize = palettize,
    .soft = soft,
    .sum_by_index = sum_by_index,
};

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
