// The palette kernels of one instruction set.
#pragma once

#include "cpu/best_split.h"

namespace coreai::cpu::COREAI_LEVEL {
namespace {

constexpr PaletteKernels kPaletteKernels = {
    best_split,
};

}  // namespace
}  // namespace coreai::cpu::COREAI_LEVEL
