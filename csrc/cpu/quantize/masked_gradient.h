// The straight-through gradient through a packed mask.
#pragma once

#include "cpu/loops.h"
#include "cpu/simd_words.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

// Of so much and less, much is in the core's own caches.
constexpr int64_t kFetchedBytes = 2 << 20;

// A product with 0 or 1 of 16-bit elements, where masks of words are bits: twice the lanes, and nothing to widen and
// to round. Returns how many of the n elements it has done.
template <class T>
COREAI_HD int64_t masked_words(const T* grad, T* out, const uint8_t* mask, int64_t n) {
  using W = Words<2>;
  using V = W::V;
  constexpr int16_t kInfinity = kIsBFloat16<T> ? 0x7f80 : 0x7c00, kNan = kIsBFloat16<T> ? 0x7fc0 : 0x7e00;
  int64_t i = 0;
  for (; i + W::kLanes <= n; i += W::kLanes) {
    typename W::M inside;
    __builtin_memcpy(&inside, mask + i / 8, sizeof(inside));
    const V words = W::load(grad + i);
    // Times zero: the sign is left, and nothing of infinities and NaN is a number.
    const auto no_product = W::greater(words & W::set(INT16_MAX), W::set(kInfinity - 1));
    const V outside = (words & W::set(INT16_MIN)) | W::where(no_product, W::set(kNan));
    W::store(out + i, W::where(inside, words) | W::where(~inside, outside));
  }
  return i;
}

// A product with 0 or 1, so that NaN and infinite gradients behave as IEEE 754 says.
template <class T>
void masked_gradient_range(const T* grad, T* out, const uint8_t* mask, int64_t n) {
  const F one = Simd::set(1.0f), zero = Simd::set(0.0f);
  int64_t i = 0;
  if constexpr (sizeof(T) == 2 && sizeof(Words<2>::M) == Words<2>::kLanes / 8) i = masked_words(grad, out, mask, n);
  for (; i + kWidth <= n; i += kWidth) {
    uint32_t bits = 0;
    for (int byte = 0; byte < kWidth / 8; ++byte) bits |= static_cast<uint32_t>(mask[i / 8 + byte]) << (8 * byte);
    Simd::store(out + i, Simd::mul(Simd::load(grad + i), Simd::select(Simd::from_bits(bits), one, zero)));
  }
  for (; i < n; i += 8) {
    const int some = static_cast<int>(min<int64_t>(8, n - i));
    const F factor = Simd::select(Simd::from_bits(mask[i / 8]), one, zero);
    Simd::store_n(out + i, Simd::mul(Simd::load_n(grad + i, some), factor), some);
  }
}

// The same of more than the core's own caches hold.
template <class T>
void masked_gradient_fetched(const T* grad, T* out, const uint8_t* mask, int64_t n) {
  constexpr int64_t kPiece = 512, kRead = 4096, kWritten = 512;
  int64_t i = 0;
  for (; i + kPiece <= n; i += kPiece) {
    for (int64_t j = i; j < i + kPiece; j += 2 * kWidth) fetch(grad + j + kRead, out + j + kWritten);
    masked_gradient_range(grad + i, out + i, mask + i / 8, kPiece);
  }
  masked_gradient_range(grad + i, out + i, mask + i / 8, n - i);
}

// Whether the next 64 bits are set, or 64 times `kWords`.
template <int kWords>
COREAI_HD bool all_set(const uint8_t* mask) {
  uint64_t words[kWords], all = ~uint64_t{0};
  __builtin_memcpy(words, mask, sizeof(words));
  for (uint64_t word : words) all &= word;
  return all == ~uint64_t{0};
}

// The same in place. Few elements are outside as a rule: the others are not even read.
template <class T>
void masked_gradient_in_place(T* grad, const uint8_t* mask, int64_t n) {
  constexpr int64_t kSpan = 64, kSpans = 8;
  int64_t i = 0;
  while (i + kSpan <= n) {
    if (i + kSpan * kSpans <= n && all_set<kSpans>(mask + i / 8)) {
      i += kSpan * kSpans;
      continue;
    }
    while (i + kSpan <= n && all_set<1>(mask + i / 8)) i += kSpan;
    const int64_t begin = i;
    while (i + kSpan <= n && !all_set<1>(mask + i / 8)) i += kSpan;
    masked_gradient_range(grad + begin, grad + begin, mask + begin / 8, i - begin);
  }
  masked_gradient_range(grad + i, grad + i, mask + i / 8, n - i);
}

// `out` is `grad`, or does not overlap it.
void masked_gradient(Element element, const void* grad, void* out, const uint8_t* mask, int64_t numel) {
  with_type(element, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(numel, kAlignment, kParallelElements, [&](int64_t begin, int64_t end) {
      T* result = static_cast<T*>(out) + begin;
      const T* from = static_cast<const T*>(grad) + begin;
      const uint8_t* bits = mask + begin / 8;
      if (grad == out) {
        masked_gradient_in_place(result, bits, end - begin);
      } else if ((end - begin) * static_cast<int64_t>(sizeof(T)) > kFetchedBytes) {
        masked_gradient_fetched(from, result, bits, end - begin);
      } else {
        masked_gradient_range(from, result, bits, end - begin);
      }
    });
  });
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
