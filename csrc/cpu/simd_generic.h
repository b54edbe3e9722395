// Eight float32 lanes as two of the compiler's 16-byte vectors: SSE2 on x86-64, NEON on Arm, anything elsewhere.
#pragma once

#include "common/element.h"

namespace coreai::cpu::COREAI_ISA {

struct Simd {
  static constexpr int kWidth = 8;
  static constexpr bool kHasQuotient = false;
  static constexpr bool kHasBf16Products = false;
  typedef float F4 __attribute__((vector_size(16)));
  typedef int32_t I4 __attribute__((vector_size(16)));
  typedef uint32_t U4 __attribute__((vector_size(16)));
  typedef uint16_t H4 __attribute__((vector_size(8)));
  struct F {
    F4 half[2];
  };
  struct I {
    I4 half[2];
  };
  using M = I;  // all bits of a lane set or clear

  static COREAI_HD F set(float x) {
    const F4 v = {x, x, x, x};
    return {v, v};
  }
  static COREAI_HD I iset(int32_t x) {
    const I4 v = {x, x, x, x};
    return {v, v};
  }
  static COREAI_HD F add(F a, F b) { return {a.half[0] + b.half[0], a.half[1] + b.half[1]}; }
  static COREAI_HD F sub(F a, F b) { return {a.half[0] - b.half[0], a.half[1] - b.half[1]}; }
  static COREAI_HD F mul(F a, F b) { return {a.half[0] * b.half[0], a.half[1] * b.half[1]}; }
  // a * b + 0.0: one rounding, with or without a fused operation.
  static COREAI_HD F mul_add_zero(F a, F b) { return add(mul(a, b), set(0.0f)); }
  static COREAI_HD F div(F a, F b) { return {a.half[0] / b.half[0], a.half[1] / b.half[1]}; }
  static COREAI_HD F min(F a, F b) { return select({a.half[0] < b.half[0], a.half[1] < b.half[1]}, a, b); }
  static COREAI_HD F max(F a, F b) { return select({a.half[0] > b.half[0], a.half[1] > b.half[1]}, a, b); }
  static COREAI_HD F round(F a) {
    const F big = set(0x1p23f);
    const F magnitude = as_float(iand(as_int(a), iset(0x7fffffff)));
    const F rounded = sub(add(magnitude, big), big);
    const F with_sign = as_float(ior(as_int(rounded), iand(as_int(a), iset(INT32_MIN))));
    return select({magnitude.half[0] < big.half[0], magnitude.half[1] < big.half[1]}, with_sign, a);
  }
  static COREAI_HD M equal(F a, F b) { return {a.half[0] == b.half[0], a.half[1] == b.half[1]}; }
  static COREAI_HD M greater(F a, F b) { return {a.half[0] > b.half[0], a.half[1] > b.half[1]}; }
  static COREAI_HD M unordered(F a, F b) {
    return {(a.half[0] != a.half[0]) | (b.half[0] != b.half[0]), (a.half[1] != a.half[1]) | (b.half[1] != b.half[1])};
  }
  static COREAI_HD M mand(M a, M b) { return iand(a, b); }
  static COREAI_HD M mor(M a, M b) { return ior(a, b); }
  static COREAI_HD M none() { return iset(0); }
  static COREAI_HD bool any(M m) { return bits(m) != 0; }
  static COREAI_HD uint32_t bits(M m) {
    const I4 s = (m.half[0] & I4{1, 2, 4, 8}) | (m.half[1] & I4{16, 32, 64, 128});
    return static_cast<uint32_t>((s[0] | s[1]) | (s[2] | s[3]));
  }
  static COREAI_HD M from_bits(uint32_t bits) {
    const I4 all = iset(static_cast<int32_t>(bits)).half[0];
    return {(all & I4{1, 2, 4, 8}) != 0, (all & I4{16, 32, 64, 128}) != 0};
  }
  static COREAI_HD F select(M m, F a, F b) {
    return as_float({(as_int(a).half[0] & m.half[0]) | (as_int(b).half[0] & ~m.half[0]),
                     (as_int(a).half[1] & m.half[1]) | (as_int(b).half[1] & ~m.half[1])});
  }
  static COREAI_HD I as_int(F a) { return {reinterpret_cast<I4>(a.half[0]), reinterpret_cast<I4>(a.half[1])}; }
  static COREAI_HD F as_float(I a) { return {reinterpret_cast<F4>(a.half[0]), reinterpret_cast<F4>(a.half[1])}; }
  static COREAI_HD I iand(I a, I b) { return {a.half[0] & b.half[0], a.half[1] & b.half[1]}; }
  static COREAI_HD I ior(I a, I b) { return {a.half[0] | b.half[0], a.half[1] | b.half[1]}; }
  // Wraps around, as the instructions of the other sets do.
  static COREAI_HD I iadd(I a, I b) {
    return {reinterpret_cast<I4>(reinterpret_cast<U4>(a.half[0]) + reinterpret_cast<U4>(b.half[0])),
            reinterpret_cast<I4>(reinterpret_cast<U4>(a.half[1]) + reinterpret_cast<U4>(b.half[1]))};
  }
  static COREAI_HD I imax(I a, I b) { return iselect({a.half[0] > b.half[0], a.half[1] > b.half[1]}, a, b); }
  static COREAI_HD I imin(I a, I b) { return iselect({a.half[0] < b.half[0], a.half[1] < b.half[1]}, a, b); }
  template <int kBits>
  static COREAI_HD I shr(I a) {
    return {reinterpret_cast<I4>(reinterpret_cast<U4>(a.half[0]) >> kBits),
            reinterpret_cast<I4>(reinterpret_cast<U4>(a.half[1]) >> kBits)};
  }
  template <int kBits>
  static COREAI_HD I shl(I a) {
    return {reinterpret_cast<I4>(reinterpret_cast<U4>(a.half[0]) << kBits),
            reinterpret_cast<I4>(reinterpret_cast<U4>(a.half[1]) << kBits)};
  }
  static COREAI_HD F to_float(I a) {
    return {__builtin_convertvector(a.half[0], F4), __builtin_convertvector(a.half[1], F4)};
  }
  // Half to even; of what 32 bits hold.
  static COREAI_HD I nearest(F a) {
    const F whole = round(min(a, set(0x1p30f)));  // of others, and of NaN, the conversion is undefined
    return {__builtin_convertvector(whole.half[0], I4), __builtin_convertvector(whole.half[1], I4)};
  }
  static COREAI_HD I truncate(F a) {  // NaN becomes INT32_MIN
    const M nan = unordered(a, a);
    const F number = select(nan, set(0.0f), a);
    const I whole = {__builtin_convertvector(number.half[0], I4), __builtin_convertvector(number.half[1], I4)};
    return iselect(nan, iset(INT32_MIN), whole);
  }
  static COREAI_HD F round_half(F a) {
    Float16 words[kWidth];
    store(words, a);
    return load(words);
  }

  template <class T>
  static COREAI_HD F load(const T* p) {
    F result;
    if constexpr (sizeof(T) == sizeof(float)) {
      __builtin_memcpy(&result, p, sizeof(result));
    } else if constexpr (__is_same(T, BFloat16)) {
      for (int i = 0; i < 2; ++i) {
        H4 words;
        __builtin_memcpy(&words, p + 4 * i, sizeof(words));
        result.half[i] = reinterpret_cast<F4>(__builtin_convertvector(words, U4) << 16);
      }
    } else {
      for (int i = 0; i < kWidth; ++i) result.half[i / 4][i % 4] = widen(p[i]);
    }
    return result;
  }
  // The low byte of each lane.
  static COREAI_HD I load_bytes(const uint8_t* p) {
    I result;
    for (int i = 0; i < kWidth; ++i) result.half[i / 4][i % 4] = p[i];
    return result;
  }
  static COREAI_HD void store_bytes(uint8_t* p, I a) {
    for (int i = 0; i < kWidth; ++i) p[i] = static_cast<uint8_t>(a.half[i / 4][i % 4]);
  }
  static COREAI_HD I load(const int32_t* p) {
    I result;
    __builtin_memcpy(&result, p, sizeof(result));
    return result;
  }
  template <class T>
  static COREAI_HD void store(T* p, F a) {
    if constexpr (sizeof(T) == sizeof(float)) {
      __builtin_memcpy(p, &a, sizeof(a));
    } else if constexpr (__is_same(T, BFloat16)) {
      const I bits = as_int(a), odd = iand(shr<16>(bits), iset(1));
      const I rounded = iselect(unordered(a, a), iset(0x7fc00000), iadd(bits, iadd(odd, iset(0x7fff))));
      for (int i = 0; i < 2; ++i) {
        const H4 words = __builtin_convertvector(reinterpret_cast<U4>(rounded.half[i]) >> 16, H4);
        __builtin_memcpy(p + 4 * i, &words, sizeof(words));
      }
    } else {
      for (int i = 0; i < kWidth; ++i) p[i] = narrow(a.half[i / 4][i % 4], p);
    }
  }
  static COREAI_HD void store(int32_t* p, I a) { __builtin_memcpy(p, &a, sizeof(a)); }
  // From the even and the odd lanes of two vectors to the vectors, and back.
  static COREAI_HD void interleave(I& a, I& b) {
    int32_t lanes[2 * kWidth];
    for (int i = 0; i < kWidth; ++i) lanes[2 * i] = a.half[i / 4][i % 4], lanes[2 * i + 1] = b.half[i / 4][i % 4];
    a = load(lanes), b = load(lanes + kWidth);
  }
  static COREAI_HD void deinterleave(F& a, F& b) {
    float lanes[2 * kWidth];
    store(lanes, a), store(lanes + kWidth, b);
    for (int i = 0; i < kWidth; ++i) a.half[i / 4][i % 4] = lanes[2 * i], b.half[i / 4][i % 4] = lanes[2 * i + 1];
  }

  // Two neighbouring vectors.
  template <class T>
  static COREAI_HD void store_pair(T* p, F a, F b) {
    store(p, a);
    store(p + kWidth, b);
  }
  template <class T>
  static COREAI_HD void store_pair_of_numbers(T* p, F a, F b) {
    store_pair(p, a, b);
  }
  template <class T>
  static COREAI_HD F load_n(const T* p, int n) {
    T buffer[kWidth] = {};
    for (int i = 0; i < n; ++i) buffer[i] = p[i];
    return load(buffer);
  }
  template <class T>
  static COREAI_HD void store_n(T* p, F a, int n) {
    T buffer[kWidth];
    store(buffer, a);
    for (int i = 0; i < n; ++i) p[i] = buffer[i];
  }
  static COREAI_HD void store_n(int32_t* p, I a, int n) {
    int32_t buffer[kWidth];
    store(buffer, a);
    for (int i = 0; i < n; ++i) p[i] = buffer[i];
  }
  static COREAI_HD M first(int n) { return from_bits((1u << n) - 1u); }

  // Lane i of the result: the minimum (maximum) over the lanes of v[i]. No NaN among them.
  static COREAI_HD F min_of_rows(const F* v) {
    return reduce_rows(v, [](float a, float b) __attribute__((always_inline)) { return a < b ? a : b; });
  }
  static COREAI_HD F max_of_rows(const F* v) {
    return reduce_rows(v, [](float a, float b) __attribute__((always_inline)) { return a > b ? a : b; });
  }
  static constexpr bool kHasWordRows = false;

 private:
  static COREAI_HD I iselect(M m, I a, I b) {
    return {(a.half[0] & m.half[0]) | (b.half[0] & ~m.half[0]), (a.half[1] & m.half[1]) | (b.half[1] & ~m.half[1])};
  }
  template <class Combine>
  static COREAI_HD F reduce_rows(const F* v, Combine combine) {
    F result;
    for (int row = 0; row < kWidth; ++row) {
      float lanes[kWidth];
      store(lanes, v[row]);
      for (int width = kWidth / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] = combine(lanes[i], lanes[i + width]);
      }
      result.half[row / 4][row % 4] = lanes[0];
    }
    return result;
  }
  static COREAI_HD float from_word(uint32_t bits) {
    float result;
    __builtin_memcpy(&result, &bits, sizeof(result));
    return result;
  }
  static COREAI_HD uint32_t to_word(float x) {
    uint32_t result;
    __builtin_memcpy(&result, &x, sizeof(result));
    return result;
  }
  static COREAI_HD float widen(double x) { return static_cast<float>(x); }
  // Scaling by a power of two moves the exponent and lets the FPU round or normalise.
  static __attribute__((noinline)) float widen(Float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
    if (magnitude >= 0x0f800000) return from_word(sign | magnitude | 0x7f800000);
    return from_word(sign | to_word(from_word(magnitude) * 0x1p112f));
  }
  static COREAI_HD double narrow(float x, const double*) { return x; }
  static __attribute__((noinline)) Float16 narrow(float x, const Float16*) {
    const uint32_t bits = to_word(x);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return Float16{static_cast<uint16_t>(sign | 0x7e00)};
    if (magnitude >= 0x477ff000) return Float16{static_cast<uint16_t>(sign | 0x7c00)};
    if (magnitude < 0x38800000) {  // subnormal: an addition rounds at the quantum 2^-24
      const float rounded = from_word(magnitude) + 0.5f;
      return Float16{static_cast<uint16_t>(sign | (to_word(rounded) - to_word(0.5f)))};
    }
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000;
    return Float16{static_cast<uint16_t>(sign | (rounded >> 13))};
  }
};

}  // namespace coreai::cpu::COREAI_ISA
