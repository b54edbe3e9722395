// torch's threads, for kernels that know nothing of torch.
#include <torch/csrc/stable/ops.h>

#include "cpu/kernels.h"

namespace coreai::cpu {

void parallel(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

int64_t threads() { return torch::stable::get_num_threads(); }

}  // namespace coreai::cpu
