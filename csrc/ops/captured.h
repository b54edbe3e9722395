// Captured calls: fake quantization of tensors of one shape, with state and settings made ready once. The library of the
// stable ABI hands them to the one with autograd, by way of a capsule: no operator, since nothing here is a tensor's
// business.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstddef>
#include <cstdint>

namespace coreai {

class CapturedCall {
 public:
  virtual ~CapturedCall() = default;
  // Input and output lie in memory as the input that it was captured for. `mask`: null if it is not wanted.
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

const CaptureFunctions* capture_functions();

// What the module calls the capsule with them.
constexpr const char* kCaptureCapsule = "coreai_kernels._C.capture_functions";

}  // namespace coreai
