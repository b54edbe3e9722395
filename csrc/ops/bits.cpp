// Integers of less than a byte, packed and unpacked.
#include <torch/csrc/stable/library.h>

#include "cpu/bits.h"
#include "ops/tensors.h"

namespace coreai {
namespace {

Tensor pack_bits(const Tensor& values, int64_t bits) {
  const Tensor dense = torch::stable::contiguous(values);
  const int64_t numel = dense.numel();
  const Tensor packed = empty(one_axis((numel * bits + 7) / 8), ScalarType::Byte);
  cpu::pack_bits(static_cast<const uint8_t*>(dense.const_data_ptr()), numel, static_cast<int>(bits),
                 static_cast<uint8_t*>(packed.mutable_data_ptr()));
  return packed;
}

Tensor unpack_bits(const Tensor& packed, int64_t bits, int64_t numel, bool is_signed) {
  const Tensor dense = torch::stable::contiguous(packed);
  const Tensor values = empty(one_axis(numel), is_signed ? ScalarType::Char : ScalarType::Byte);
  cpu::unpack_bits(static_cast<const uint8_t*>(dense.const_data_ptr()), numel, static_cast<int>(bits), is_signed,
                   static_cast<uint8_t*>(values.mutable_data_ptr()));
  return values;
}

STABLE_TORCH_LIBRARY_IMPL(coreai_kernels, CPU, library) {
  COREAI_IMPL("pack_bits", &pack_bits);
  COREAI_IMPL("unpack_bits", &unpack_bits);
}

}  // namespace
}  // namespace coreai
