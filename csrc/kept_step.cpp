// See kept_step.h. The operators that hand steps over have an address for a result, which schemas can only call a number.
#include "kept_step.h"

#include <torch/csrc/stable/library.h>

#include <memory>

#include "jobs.h"

namespace coreai {
namespace {

// Larger outputs ask for huge pages, and cost more than it takes to make a step ready.
constexpr int64_t kMostBytes = 16 << 20;

template <class Job>
class Step final : public KeptStep {
 public:
  template <class... State>
  Step(const Operand& x, const Blocks& block_size, const State&... state)
      : layout_(cpu::make_layout(x.shape, x.order, block_size)), job_(x, layout_, state..., nullptr) {}

  // Whether kernels use the state itself, not a copy in another order.
  bool is_direct() const { return layout_.block_index.empty(); }
  void run(const void* input, void* output, uint8_t* mask) const override { job_.run_on(input, output, mask); }

 private:
  cpu::Layout layout_;
  Job job_;
};

// Its address, or zero if there can be none.
template <class Job, class... State>
int64_t keep(const Tensor& input, const Blocks& block_size, const State&... state) {
  const int64_t bytes = input.numel() * static_cast<int64_t>(input.element_size());
  if (is_double(input) || bytes == 0 || bytes > kMostBytes) return 0;
  const Operand x(input, input.scalar_type());
  if (x.data != input.const_data_ptr()) return 0;
  auto step = std::make_unique<Step<Job>>(x, block_size, state...);
  return step->is_direct() ? reinterpret_cast<int64_t>(static_cast<KeptStep*>(step.release())) : 0;
}

int64_t keep_simulation(const Tensor& input, const Tensor& scale, const Optional& zero_point, const Optional& minval,
                        const Blocks& block_size, int64_t format, double quant_min, double quant_max) {
  return keep<FakeQuantizeJob>(input, block_size, scale, zero_point, minval, format, quant_min, quant_max);
}

int64_t keep_step(const Tensor& input, const Tensor& scale, const Optional& zero_point, const Optional& minval,
                  const Optional& running_min, const Optional& running_max, bool has_running, const Tensor& settings) {
  const auto [block_size, its] = unpacked(settings, input.dim(), has_running);
  return keep<StepJob>(input, block_size, StepState{scale, zero_point, minval, running_min, running_max}, its);
}

STABLE_TORCH_LIBRARY_IMPL(coreai_kernels, CPU, library) {
  library.impl("keep_simulation", TORCH_BOX(&keep_simulation));
  library.impl("keep_step", TORCH_BOX(&keep_step));
}

}  // namespace
}  // namespace coreai
