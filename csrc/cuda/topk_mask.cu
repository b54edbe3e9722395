// topk_mask and topk_masks for CUDA tensors: registration, memory, stream. The selection is in select.cuh.
#include <torch/csrc/stable/library.h>

#include "cuda/select.cuh"
#include "cuda/tensors.cuh"

namespace coreai::cuda {
namespace {

std::vector<Tensor> topk_masks(std::vector<Tensor> weights, int64_t num_keep) {
  std::vector<Tensor> masks;
  int64_t numel = 0;
  for (const Tensor& weight : weights) {
    masks.push_back(torch::stable::empty_like(weight));
    numel += weight.numel();
  }
  if (num_keep == 0 || num_keep == numel) {
    for (Tensor& mask : masks) torch::stable::fill_(mask, num_keep == 0 ? 0.0 : 1.0);
    return masks;
  }
  const DeviceGuard guard(weights.front().get_device_index());
  // Ties go by index: the kernels take elements in row-major order.
  std::vector<Tensor> rows, found;
  std::vector<DeviceTensor> tensors;
  for (size_t i = 0; i < weights.size(); ++i) {
    rows.push_back(torch::stable::contiguous(weights[i]));
    found.push_back(masks[i].is_contiguous() ? masks[i] : torch::stable::empty_like(rows[i]));
    if (rows[i].numel() > 0) {
      tensors.push_back(
          {element_of("weight", rows[i]), rows[i].const_data_ptr(), found[i].mutable_data_ptr(), rows[i].numel()});
    }
  }
  const Tensor workspace = torch::stable::new_zeros(rows.front(), {workspace_words(tensors)}, ScalarType::Long);
  queue_topk_masks(tensors, num_keep, workspace.mutable_data_ptr(), current_stream(weights.front().get_device_index()));
  check_launch("topk_mask");
  for (size_t i = 0; i < masks.size(); ++i) {
    if (masks[i].const_data_ptr() != found[i].const_data_ptr()) torch::stable::copy_(masks[i], found[i]);
  }
  return masks;
}

Tensor topk_mask(Tensor weight, int64_t num_keep) { return topk_masks({weight}, num_keep).front(); }

COREAI_REGISTER(COREAI_GPU_LIBRARY, library) {
  library.impl("topk_mask", TORCH_BOX(&topk_mask));
  library.impl("topk_masks", TORCH_BOX(&topk_masks));
}

}  // namespace
}  // namespace coreai::cuda
