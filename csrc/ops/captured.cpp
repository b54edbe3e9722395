// See ops/captured.h.
#include "ops/captured.h"

#include <memory>

#include "ops/jobs.h"

namespace coreai {
namespace {

// Larger outputs ask for huge pages, and cost more than it takes to make a call ready.
constexpr int64_t kMostBytes = 16 << 20;

template <class Job>
class Captured final : public CapturedCall {
 public:
  template <class... State>
  Captured(const Operand& x, const Blocks& block_size, const State&... state)
      : layout_(cpu::make_layout(x.shape, x.order, block_size)), job_(x, layout_, state..., nullptr) {}

  // Whether kernels use the state itself, not a copy in another order.
  bool is_direct() const { return layout_.block_index.empty(); }
  void run(const void* input, void* output, uint8_t* mask) const override { job_.run_on(input, output, mask); }

 private:
  cpu::Layout layout_;
  Job job_;
};

template <class Job, class... State>
CapturedCall* capture(const Tensor& input, const Blocks& block_size, const State&... state) {
  const int64_t bytes = input.numel() * static_cast<int64_t>(input.element_size());
  if (is_double(input) || bytes == 0 || bytes > kMostBytes) return nullptr;
  const Operand x(input, input.scalar_type());
  if (x.data != input.const_data_ptr()) return nullptr;
  auto call = std::make_unique<Captured<Job>>(x, block_size, state...);
  return call->is_direct() ? call.release() : nullptr;
}

CapturedCall* simulation(AtenTensorHandle input, const AtenTensorHandle (&params)[3], const int64_t* block_size, size_t axes,
                         int64_t format, double quant_min, double quant_max) {
  const Tensor x(input), scale(params[0]);
  const Optional zero_point = owned(params[1]), minval = owned(params[2]);
  return capture<FakeQuantizeJob>(x, Blocks(block_size, block_size + axes), scale, zero_point, minval, format, quant_min,
                                  quant_max);
}

CapturedCall* step(AtenTensorHandle input, const AtenTensorHandle (&state)[5], bool has_running,
                   AtenTensorHandle packed_config) {
  const Tensor x(input), packed(packed_config);
  const StepState its = {Tensor(state[0]), owned(state[1]), owned(state[2]), owned(state[3]), owned(state[4])};
  const auto config = QuantConfig::unpacked(packed, x.dim());
  return capture<StepJob>(x, config.block_size, its, config, has_running);
}

}  // namespace

const CaptureFunctions* capture_functions() {
  static const CaptureFunctions functions = {&simulation, &step};
  return &functions;
}

}  // namespace coreai
