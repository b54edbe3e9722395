// csrc/cuda/select.cuh on the CPU, as a function that Python can call.
#include "cuda/select.cuh"

extern "C" void topk_masks(int count, const int* elements, const void** inputs, void** masks, const int64_t* numels,
                           int64_t num_keep) {
  std::vector<coreai::cuda::DeviceTensor> tensors;
  for (int i = 0; i < count; ++i) {
    tensors.push_back({static_cast<coreai::Element>(elements[i]), inputs[i], masks[i], numels[i]});
  }
  std::vector<int64_t> workspace(static_cast<size_t>(coreai::cuda::workspace_words(tensors)));
  coreai::cuda::queue_topk_masks(tensors, num_keep, workspace.data(), 0);
}
