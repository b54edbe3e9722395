// Keys of elements whose type is known at run time, and bounds for them.
#pragma once

#include "common/magnitude.h"

namespace coreai::cpu {

// body.operator()<from, to>(): the elements of one tensor, and the type in which all are compared.
template <class Body>
auto with_elements(Element from, Element to, Body body) {
  return with_element(from, [&]<Element kFrom>() {
    if (to == Element::kFloat64) return body.template operator()<kFrom, Element::kFloat64>();
    if constexpr (kFrom != Element::kFloat64) {
      if (to == Element::kFloat32) return body.template operator()<kFrom, Element::kFloat32>();
    }
    return body.template operator()<kFrom, kFrom>();
  });
}

inline uint64_t nan_key(Element element) {
  return with_element(element, []<Element kElement>() { return static_cast<uint64_t>(kNanKey<kElement>); });
}

inline int key_bits(Element element) {
  return with_element(element, []<Element kElement>() { return kKeyBits<kElement>; });
}

// The least key of type `from` whose value is at least that of `bound`, a key of type `to`.
inline uint64_t narrow_key(Element from, Element to, uint64_t bound) {
  return with_elements(from, to, [&]<Element kFrom, Element kTo>() {
    uint64_t low = 0, high = kNanKey<kFrom>;
    while (low < high) {
      const uint64_t middle = (low + high) / 2;
      const uint64_t wide = widen_key<kFrom, kTo>(static_cast<WordOf<kFrom>>(middle));
      if (wide < bound) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  });
}

// The greatest key of type `from` whose value is at most that of `bound`.
inline uint64_t narrow_key_down(Element from, Element to, uint64_t bound) {
  return bound >= nan_key(to) ? nan_key(from) : narrow_key(from, to, bound + 1) - 1;
}

template <class Word>
Word word_at(const void* data, int64_t index) {
  return static_cast<const Word*>(data)[index];
}

struct Band {
  uint64_t low, high;
};

}  // namespace coreai::cpu
