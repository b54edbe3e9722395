// Captured calls of operators for CUDA tensors. See ops/captured.h.
//
// They hold no memory of their own but the state, which is the caller's: a CUDA graph that was made with a captured call
// does not depend on how long that lives. What a kernel needs beside it is allocated at each call.
#pragma once

#include <memory>
#include <utility>

#include "cuda/tensors.cuh"
#include "ops/captured.h"

namespace coreai::cuda {

// As in CaptureFunctions.
CapturedCall* capture_simulation(AtenTensorHandle input, const AtenTensorHandle (&params)[3], const int64_t* block_size,
                                 size_t axes, int64_t format, double quant_min, double quant_max);
CapturedCall* capture_step(AtenTensorHandle input, const AtenTensorHandle (&state)[5], bool has_running,
                           AtenTensorHandle packed_config);

namespace {

template <class Job>
class Captured final : public CapturedCall {
 public:
  template <class... State>
  Captured(cpu::Layout layout, const DeviceInput& x, const Blocks& block_size, const State&... state)
      : layout_(std::move(layout)), job_(x, layout_, block_size, state...) {}

  void run(const void* input, void* output, uint8_t* mask) const override { job_.run_on(input, output, mask); }

 private:
  cpu::Layout layout_;
  Job job_;
};

template <class Job, class... State>
CapturedCall* capture(const Tensor& input, const Blocks& block_size, const State&... state) {
  const Ints shape = to_ints(input.sizes()), strides = to_ints(input.strides());
  // Others are copied at each call, first.
  if (is_double(input) || input.numel() == 0 || !is_dense(shape, strides, memory_order(shape, strides))) return nullptr;
  const DeviceInput x(input);
  auto layout = cpu::make_layout(x.shape, x.order, block_size);
  // Else kernels would use copies of the state in another order.
  if (!layout.block_index.empty()) return nullptr;
  return std::make_unique<Captured<Job>>(std::move(layout), x, block_size, state...).release();
}

}  // namespace
}  // namespace coreai::cuda
