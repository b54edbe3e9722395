// Masks of the blocks of largest L1 norm.
#pragma once

#include "cpu/geometry.h"

namespace coreai::cpu {

// Writes, for each block in row-major order, one if it is among the `num_keep` of largest norm, else zero; of equal
// norms the block of lower index is kept. The input is dense, in the layout's memory order, and not empty.
void top_blocks(const Layout& layout, Element element, const void* input, void* chosen, int64_t num_keep);

// Writes ones in the `num_keep` blocks of largest norm and zeros elsewhere; of equal norms the block of lower
// row-major index is kept. Input and mask are dense, in the layout's memory order, and not empty.
void block_mask(const Layout& layout, Element element, const void* input, void* mask, int64_t num_keep);

}  // namespace coreai::cpu
