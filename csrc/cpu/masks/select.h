// Masks of the largest magnitudes of several tensors together.
#pragma once

#include <vector>

#include "cpu/geometry.h"

namespace coreai::cpu {

// Dense memory, and the mask to write over as much memory in the same order.
struct MaskTensor {
  Element element;
  const void* input;
  void* mask;
  int64_t numel;
  Ints shape, order;  // axes from the outermost in memory to the innermost; none if the memory is in row-major order
};

// Writes ones where the magnitude is among the `num_keep` largest of all tensors, 0 <= num_keep <= their elements.
// Ties: the earlier tensor, then the lower index in row-major order. False, with nothing of use written, if the
// tensors have so many ties that this takes all of them in row-major order.
bool write_topk_masks(const std::vector<MaskTensor>& tensors, int64_t num_keep);

}  // namespace coreai::cpu
