// Captured calls: fake quantization of tensors of one shape, with state and settings made ready once. The libraries of the
// stable ABI, for CPU tensors and for CUDA tensors, hand them to the one with autograd: no operator, since nothing here is a
// tensor's business.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstddef>
#include <cstdint>

namespace coreai {

class CapturedCall {
 public:
  virtual ~CapturedCall() = default;
  // Input and output lie in memory as the input that it was captured for, on its device, which is the current one. `mask`:
  // null if it is not wanted. On a GPU the kernels are queued on the device's current stream.
  virtual void run(const void* input, void* output, uint8_t* mask) const = 0;
};

// Handles belong to the callee, null for a tensor that is not there. Results belong to the caller; they are null where
// there can be no captured call.
struct CaptureFunctions {
  // Of coreai_kernels::fake_quantize_forward.
  CapturedCall* (*simulation)(AtenTensorHandle input, const AtenTensorHandle (&params)[3], const int64_t* block_size,
                              size_t axes, int64_t format, double quant_min, double quant_max);
  // Of coreai_kernels::observe_and_fake_quantize_.
  CapturedCall* (*step)(AtenTensorHandle input, const AtenTensorHandle (&state)[5], bool has_running,
                        AtenTensorHandle packed_config);
};

// Of CPU tensors.
const CaptureFunctions* capture_functions();

// What the module calls the capsule with them. The library for CUDA tensors, which is no module, has
// coreai_cuda_capture_functions() instead.
constexpr const char* kCaptureCapsule = "coreai_kernels._C.capture_functions";

}  // namespace coreai
