// See kept_step.h. The operator that hands steps over has an address for a result, which schemas can only call a number.
#include "kept_step.h"

#include <torch/csrc/stable/library.h>

#include <memory>

#include "jobs.h"

namespace coreai {
namespace {

// Larger outputs ask for huge pages, and cost more than it takes to make a step ready.
constexpr int64_t kMostBytes = 16 << 20;

class Step final : public KeptStep {
 public:
  Step(const Operand& x, const StepState& state, const Blocks& block_size, const StepSettings& settings)
      : layout_(cpu::make_layout(x.shape, x.order, block_size)), job_(settings, x, layout_, state, nullptr) {}

  // Whether kernels read and write the state itself, not a copy in another order.
  bool is_direct() const { return layout_.block_index.empty(); }
  void run(const void* input, void* output, uint8_t* mask) const override { job_.run_on(input, output, mask); }

 private:
  cpu::Layout layout_;
  StepJob job_;
};

int64_t keep_step(const Tensor& input, const Tensor& scale, const Optional& zero_point, const Optional& minval,
                  const Optional& running_min, const Optional& running_max, bool has_running, const Tensor& settings) {
  const Operand x(input, input.scalar_type());
  const bool is_small = input.numel() > 0 && input.numel() * static_cast<int64_t>(input.element_size()) <= kMostBytes;
  if (is_double(input) || !is_small || x.data != input.const_data_ptr()) return 0;
  const auto [block_size, its] = unpacked(settings, input.dim(), has_running);
  auto step = std::make_unique<Step>(x, StepState{scale, zero_point, minval, running_min, running_max}, block_size, its);
  return step->is_direct() ? reinterpret_cast<int64_t>(static_cast<KeptStep*>(step.release())) : 0;
}

STABLE_TORCH_LIBRARY_IMPL(coreai_kernels, CPU, library) { library.impl("keep_step", TORCH_BOX(&keep_step)); }

}  // namespace
}  // namespace coreai
