// Magnitudes as unsigned integers, called keys: the order that masks rank elements in.
//
// A key is the element's bits without the sign, so that -0.0 equals 0.0 and subnormals differ; all NaNs share the
// key above infinity's. Keys of a narrower type widen to those of a wider one as the values do, exactly.
#pragma once

#include "common/element.h"

namespace coreai {

template <Element kElement>
struct Magnitude;
template <>
struct Magnitude<Element::kFloat32> {
  using Word = uint32_t;
  static constexpr Word kInfinity = 0x7f800000, kOne = 0x3f800000;
};
template <>
struct Magnitude<Element::kBFloat16> {
  using Word = uint16_t;
  static constexpr Word kInfinity = 0x7f80, kOne = 0x3f80;
};
template <>
struct Magnitude<Element::kFloat16> {
  using Word = uint16_t;
  static constexpr Word kInfinity = 0x7c00, kOne = 0x3c00;
};
template <>
struct Magnitude<Element::kFloat64> {
  using Word = uint64_t;
  static constexpr Word kInfinity = 0x7ff0000000000000, kOne = 0x3ff0000000000000;
};

template <Element kElement>
using WordOf = typename Magnitude<kElement>::Word;

template <Element kElement>
constexpr WordOf<kElement> kNanKey = Magnitude<kElement>::kInfinity + 1;

// Bits that a key can have: all but the sign.
template <Element kElement>
constexpr int kKeyBits = 8 * sizeof(WordOf<kElement>) - 1;

template <Element kElement>
COREAI_HD WordOf<kElement> magnitude_key(WordOf<kElement> bits) {
  using Word = WordOf<kElement>;
  const Word magnitude = bits & static_cast<Word>(static_cast<Word>(~Word{0}) >> 1);
  return magnitude < kNanKey<kElement> ? magnitude : kNanKey<kElement>;
}

// body.operator()<element>()
template <class Body>
inline auto with_element(Element element, Body body) {
  switch (element) {
    case Element::kBFloat16:
      return body.template operator()<Element::kBFloat16>();
    case Element::kFloat16:
      return body.template operator()<Element::kFloat16>();
    case Element::kFloat64:
      return body.template operator()<Element::kFloat64>();
    default:
      return body.template operator()<Element::kFloat32>();
  }
}

// Key of the same value in another type that holds it. Subnormals are small integers times a power of two.
template <Element kFrom, Element kTo>
COREAI_HD WordOf<kTo> widen_key(WordOf<kFrom> key) {
  if constexpr (kFrom == kTo) {
    return key;
  } else if constexpr (kTo == Element::kFloat64 && kFrom != Element::kFloat32) {
    return widen_key<Element::kFloat32, kTo>(widen_key<kFrom, Element::kFloat32>(key));
  } else {
    if (key >= Magnitude<kFrom>::kInfinity) {
      return Magnitude<kTo>::kInfinity + static_cast<WordOf<kTo>>(key - Magnitude<kFrom>::kInfinity);
    }
    if constexpr (kFrom == Element::kBFloat16) {
      return static_cast<uint32_t>(key) << 16;
    } else if constexpr (kFrom == Element::kFloat16) {
      if (key >= 0x400) return (static_cast<uint32_t>(key) << 13) + (112u << 23);
      const float value = static_cast<float>(key) * 0x1p-24f;
      uint32_t bits;
      __builtin_memcpy(&bits, &value, sizeof(bits));
      return bits;
    } else {
      if (key >= 0x800000) return (static_cast<uint64_t>(key) << 29) + (uint64_t{896} << 52);
      const double value = static_cast<double>(key) * 0x1p-149;
      uint64_t bits;
      __builtin_memcpy(&bits, &value, sizeof(bits));
      return bits;
    }
  }
}

// Bits [shift, shift + bits) of a key.
template <class Key>
COREAI_HD uint32_t key_digit(Key key, int shift, int bits) {
  return static_cast<uint32_t>(key >> shift) & ((1u << bits) - 1u);
}

}  // namespace coreai
