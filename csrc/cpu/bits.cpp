#include "cpu/bits.h"

#include <stdexcept>

#include "cpu/kernels.h"

namespace coreai::cpu {
namespace {

// Eight values fill `bits` whole bytes, so that threads and loops can start at any multiple of eight. They are
// handled as the bytes of one word, whose fields are joined pairwise: 8 of kBits, 4 of 2 kBits, 2 of 4 kBits.
constexpr int64_t kGroup = 8;
constexpr int64_t kGrain = 2 * kParallelElements;

constexpr uint64_t repeat(uint64_t field, int width) {
  uint64_t word = 0;
  for (int at = 0; at < 64; at += width) word |= field << at;
  return word;
}

// Each field of `width` bits holds two of half the width, `used` bits filled in each: close the gap between them.
constexpr uint64_t join(uint64_t word, int width, int used) {
  const uint64_t low = repeat((uint64_t{1} << used) - 1, width);
  return (word & low) | ((word >> (width / 2 - used)) & (low << used));
}

constexpr uint64_t split(uint64_t word, int width, int used) {
  const uint64_t low = repeat((uint64_t{1} << used) - 1, width);
  return (word & low) | ((word & (low << used)) << (width / 2 - used));
}

template <int kBits>
uint64_t pack_word(uint64_t word) {
  word &= repeat((uint64_t{1} << kBits) - 1, 8);
  if constexpr (kBits < 8) {
    word = join(join(word, 16, kBits), 32, 2 * kBits);
    word = (word & ((uint64_t{1} << 4 * kBits) - 1)) | (word >> 32 << 4 * kBits);
  }
  return word;
}

template <int kBits>
uint64_t unpack_word(uint64_t word, bool is_signed) {
  if constexpr (kBits < 8) {
    const uint64_t low = (uint64_t{1} << 4 * kBits) - 1;
    word = (word & low) | (word >> 4 * kBits & low) << 32;
    word = split(split(word, 32, 2 * kBits), 16, kBits);
    if (is_signed) word |= (word >> (kBits - 1) & repeat(1, 8)) * (256 - (1 << kBits));
  }
  return word;
}

// The bytes of a word, the lowest first, whatever the machine's order.
uint64_t load_bytes(const uint8_t* bytes, int64_t count) {
  uint64_t word = 0;
  for (int64_t i = 0; i < count; ++i) word |= static_cast<uint64_t>(bytes[i]) << (8 * i);
  return word;
}

void store_bytes(uint8_t* bytes, uint64_t word, int64_t count) {
  for (int64_t i = 0; i < count; ++i) bytes[i] = static_cast<uint8_t>(word >> (8 * i));
}

template <int kBits>
void pack_groups(const uint8_t* values, int64_t begin, int64_t end, int64_t count, uint8_t* packed) {
  int64_t group = begin;
  for (; group < end && (group + 1) * kGroup <= count; ++group) {
    store_bytes(packed + group * kBits, pack_word<kBits>(load_bytes(values + group * kGroup, kGroup)), kBits);
  }
  if (group < end) {
    const int64_t rest = count - group * kGroup;
    const uint64_t word = pack_word<kBits>(load_bytes(values + group * kGroup, rest));
    store_bytes(packed + group * kBits, word, (rest * kBits + 7) / 8);
  }
}

template <int kBits>
void unpack_groups(const uint8_t* packed, int64_t begin, int64_t end, int64_t count, bool is_signed, uint8_t* values) {
  int64_t group = begin;
  for (; group < end && (group + 1) * kGroup <= count; ++group) {
    store_bytes(values + group * kGroup, unpack_word<kBits>(load_bytes(packed + group * kBits, kBits), is_signed), kGroup);
  }
  if (group < end) {
    const int64_t rest = count - group * kGroup;
    const uint64_t word = load_bytes(packed + group * kBits, (rest * kBits + 7) / 8);
    store_bytes(values + group * kGroup, unpack_word<kBits>(word, is_signed), rest);
  }
}

template <int kBits>
struct Width {
  static constexpr int value = kBits;
};

template <class Body>
void with_width(int bits, Body body) {
  switch (bits) {
    case 1:
      return body(Width<1>{});
    case 2:
      return body(Width<2>{});
    case 3:
      return body(Width<3>{});
    case 4:
      return body(Width<4>{});
    case 5:
      return body(Width<5>{});
    case 6:
      return body(Width<6>{});
    case 7:
      return body(Width<7>{});
    case 8:
      return body(Width<8>{});
    default:
      throw std::invalid_argument("bits must be in 1..8");
  }
}

template <class Body>
void over_groups(int64_t count, Body body) {
  parallel(
      0, (count + kGroup - 1) / kGroup, kGrain / kGroup,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<Body*>(context))(begin, end); }, &body);
}

}  // namespace

void pack_bits(const uint8_t* values, int64_t count, int bits, uint8_t* packed) {
  with_width(bits, [&](auto width) {
    over_groups(count,
                [&](int64_t begin, int64_t end) { pack_groups<decltype(width)::value>(values, begin, end, count, packed); });
  });
}

void unpack_bits(const uint8_t* packed, int64_t count, int bits, bool is_signed, uint8_t* values) {
  with_width(bits, [&](auto width) {
    over_groups(count, [&](int64_t begin, int64_t end) {
      unpack_groups<decltype(width)::value>(packed, begin, end, count, is_signed, values);
    });
  });
}

void unpack_some(const uint8_t* packed, int64_t count, int bits, uint8_t* values) {
  with_width(bits, [&](auto width) {
    unpack_groups<decltype(width)::value>(packed, 0, (count + kGroup - 1) / kGroup, count, false, values);
  });
}

}  // namespace coreai::cpu
