// Where a threshold is, most likely.
#pragma once

#include "cpu/masks/keys.h"
#include "cpu/masks/select.h"

namespace coreai::cpu {

// A band of keys of type `common` that holds the key of the element of rank `num_keep` of all tensors' `total`
// elements, most likely, and a few per cent of them.
Band likely_band(const std::vector<MaskTensor>& tensors, Element common, int64_t total, int64_t num_keep);

}  // namespace coreai::cpu
