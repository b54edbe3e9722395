// What a thread loads and stores at once: 16 bytes of elements.
#pragma once

#include "common/magnitude.h"
#include "cuda/lane.cuh"
#include "cuda/launch.cuh"

namespace coreai::cuda {

// One element of a 16-bit type and back; rounded to nearest even.
template <Element kElement>
__device__ __forceinline__ float widen(uint32_t word) {
  if constexpr (kElement == Element::kBFloat16) {
    return Lane::as_float(static_cast<int32_t>(word << 16));
  } else {
#if defined(COREAI_EMULATED_THREADS)
    return emulation::from_half(static_cast<uint16_t>(word));
#else
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(static_cast<uint16_t>(word)));
    return result;
#endif
  }
}

template <Element kElement>
__device__ __forceinline__ uint32_t narrow(float low, float high) {
#if defined(COREAI_EMULATED_THREADS)
  const auto word = [](float x) -> uint32_t {
    return kElement == Element::kBFloat16 ? emulation::to_bfloat16(x) : emulation::to_half(x);
  };
  return word(low) | word(high) << 16;
#else
  uint32_t result;
  if constexpr (kElement == Element::kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  }
  return result;
#endif
}

template <Element kElement>
__device__ __forceinline__ float load_element(const WordOf<kElement>* x) {
  if constexpr (kElement == Element::kFloat32) {
    return Lane::as_float(static_cast<int32_t>(*x));
  } else {
    return widen<kElement>(*x);
  }
}

template <Element kElement>
__device__ __forceinline__ void store_element(WordOf<kElement>* x, float value) {
  if constexpr (kElement == Element::kFloat32) {
    *x = static_cast<uint32_t>(Lane::as_int(value));
  } else {
    *x = static_cast<uint16_t>(narrow<kElement>(value, 0.0f));
  }
}

// The same of a type that is known when the kernel runs; not float64.
__device__ __forceinline__ float load_as(Element element, const void* from, int64_t at) {
  if (element == Element::kBFloat16) return widen<Element::kBFloat16>(static_cast<const uint16_t*>(from)[at]);
  if (element == Element::kFloat16) return widen<Element::kFloat16>(static_cast<const uint16_t*>(from)[at]);
  return static_cast<const float*>(from)[at];
}

__device__ __forceinline__ void store_as(Element element, void* to, int64_t at, float value) {
  if (element == Element::kBFloat16) {
    store_element<Element::kBFloat16>(static_cast<uint16_t*>(to) + at, value);
  } else if (element == Element::kFloat16) {
    store_element<Element::kFloat16>(static_cast<uint16_t*>(to) + at, value);
  } else {
    static_cast<float*>(to)[at] = value;
  }
}

template <Element kElement>
struct Pack {
  using Word = WordOf<kElement>;
  static constexpr int kSize = 16 / static_cast<int>(sizeof(Word));
  uint4 raw;

  static __device__ __forceinline__ Pack load(const Word* aligned) { return {*reinterpret_cast<const uint4*>(aligned)}; }
  __device__ __forceinline__ void store(Word* aligned) const { *reinterpret_cast<uint4*>(aligned) = raw; }

  __device__ __forceinline__ void unpack(float (&values)[kSize]) const {
    const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kElement == Element::kFloat32) {
        values[i] = Lane::as_float(static_cast<int32_t>(word[i]));
      } else if constexpr (kElement == Element::kBFloat16) {
        values[2 * i] = widen<kElement>(word[i]);
        values[2 * i + 1] = Lane::as_float(static_cast<int32_t>(word[i] & 0xffff0000u));
      } else {
        values[2 * i] = widen<kElement>(word[i] & 0xffffu);
        values[2 * i + 1] = widen<kElement>(word[i] >> 16);
      }
    }
  }
  // Gives values without signs those of other elements.
  __device__ __forceinline__ void add_signs_of(const Pack& other) {
    constexpr uint32_t kSigns = kElement == Element::kFloat32 ? 0x80000000u : 0x80008000u;
    raw = {raw.x | (other.raw.x & kSigns), raw.y | (other.raw.y & kSigns), raw.z | (other.raw.z & kSigns),
           raw.w | (other.raw.w & kSigns)};
  }
  static __device__ __forceinline__ Pack of(const float (&values)[kSize]) {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kElement == Element::kFloat32) {
        word[i] = static_cast<uint32_t>(Lane::as_int(values[i]));
      } else {
        word[i] = narrow<kElement>(values[2 * i], values[2 * i + 1]);
      }
    }
    return {{word[0], word[1], word[2], word[3]}};
  }
};

// Quotients of numbers below 2^31 by one that is known when kernels are launched (T. Granlund and P. L. Montgomery,
// Division by Invariant Integers using Multiplication, PLDI 1994): a sum, a product and a shift, also of 1.
struct Divider {
  uint32_t factor = 0xffffffffu, shift = 0;

  static Divider by(uint32_t divisor) {
    uint32_t shift = 0;
    while ((uint64_t{2} << shift) <= divisor) ++shift;
    const uint64_t factor = (uint64_t{1} << (32 + shift)) / divisor;
    return {static_cast<uint32_t>(factor > 0xffffffffu ? 0xffffffffu : factor), shift};
  }
  COREAI_HD uint32_t quotient(uint32_t n) const {
#if defined(__CUDA_ARCH__)
    return __umulhi(n + 1, factor) >> shift;
#else
    return static_cast<uint32_t>((uint64_t{n} + 1) * factor >> 32) >> shift;
#endif
  }
};

}  // namespace coreai::cuda
