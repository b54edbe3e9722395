// The selection for tensors of some thousand elements, in row-major order.
#pragma once

#include "cpu/masks/keys.h"
#include "cpu/masks/select.h"

namespace coreai::cpu {

// As write_topk_masks, by keys of type `common` of all tensors' `total` elements, 0 < num_keep < total.
void write_few_masks(const std::vector<MaskTensor>& tensors, Element common, int64_t total, int64_t num_keep);

}  // namespace coreai::cpu
