// Values of one to eight bits as a little-endian bit stream.
#pragma once

#include <cstdint>

namespace coreai::cpu {

// The low `bits` bits of each of `count` bytes into ceil(count * bits / 8) bytes.
void pack_bits(const uint8_t* values, int64_t count, int bits, uint8_t* packed);

// Inverse; with `is_signed`, two's complement is extended to the byte.
void unpack_bits(const uint8_t* packed, int64_t count, int bits, bool is_signed, uint8_t* values);

// The same for unsigned values on the calling thread alone.
void unpack_some(const uint8_t* packed, int64_t count, int bits, uint8_t* values);

}  // namespace coreai::cpu
