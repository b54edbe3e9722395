// A fake quantizer's step on tensors of one shape, with state and settings made ready once: what the library of the
// stable ABI hands over to the one with autograd.
#pragma once

#include <cstdint>

namespace coreai {

class KeptStep {
 public:
  virtual ~KeptStep() = default;
  // Input and output lie in memory as the input that the step was made for. `mask`: null if it is not wanted.
  virtual void run(const void* input, void* output, uint8_t* mask) const = 0;
};

}  // namespace coreai
