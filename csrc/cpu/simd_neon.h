// Eight float32 lanes as two registers of four: Advanced SIMD of AArch64 (NEON), which all its processors have.
#pragma once

#include <arm_neon.h>

#include "common/element.h"

namespace coreai::cpu::COREAI_ISA {

struct Simd {
  static constexpr int kWidth = 8;
  static constexpr bool kHasQuotient = false;  // a division is as quick: one instruction, where a quotient takes four
  static constexpr bool kHasBf16Products = false;
  struct F {
    float32x4_t half[2];
  };
  struct I {
    int32x4_t half[2];
  };
  struct M {  // all bits of a lane set or clear
    uint32x4_t half[2];
  };

  static COREAI_HD F set(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  static COREAI_HD I iset(int32_t x) { return {vdupq_n_s32(x), vdupq_n_s32(x)}; }
  static COREAI_HD F add(F a, F b) { return {vaddq_f32(a.half[0], b.half[0]), vaddq_f32(a.half[1], b.half[1])}; }
  static COREAI_HD F sub(F a, F b) { return {vsubq_f32(a.half[0], b.half[0]), vsubq_f32(a.half[1], b.half[1])}; }
  static COREAI_HD F mul(F a, F b) { return {vmulq_f32(a.half[0], b.half[0]), vmulq_f32(a.half[1], b.half[1])}; }
  static COREAI_HD F div(F a, F b) { return {vdivq_f32(a.half[0], b.half[0]), vdivq_f32(a.half[1], b.half[1])}; }
  // a * b + 0.0: one rounding, with or without a fused operation, which would overwrite the zero.
  static COREAI_HD F mul_add_zero(F a, F b) { return add(mul(a, b), set(0.0f)); }
  // The second operand if they are equal or unordered, as on x86: FMIN and FMAX order zeros, and keep NaN.
  static COREAI_HD F min(F a, F b) { return select(greater(b, a), a, b); }
  static COREAI_HD F max(F a, F b) { return select(greater(a, b), a, b); }
  // NaN stays NaN; where a bound and the value are zeros of different sign, the result is either of them.
  static COREAI_HD F clamp(F x, F low, F high) {
    return {vminq_f32(vmaxq_f32(x.half[0], low.half[0]), high.half[0]),
            vminq_f32(vmaxq_f32(x.half[1], low.half[1]), high.half[1])};
  }
  // The least and the largest, and NaN where there is one.
  static COREAI_HD F min_or_nan(F a, F b) { return {vminq_f32(a.half[0], b.half[0]), vminq_f32(a.half[1], b.half[1])}; }
  static COREAI_HD F max_or_nan(F a, F b) { return {vmaxq_f32(a.half[0], b.half[0]), vmaxq_f32(a.half[1], b.half[1])}; }
  static COREAI_HD F round(F a) { return {vrndnq_f32(a.half[0]), vrndnq_f32(a.half[1])}; }
  static COREAI_HD M equal(F a, F b) { return {vceqq_f32(a.half[0], b.half[0]), vceqq_f32(a.half[1], b.half[1])}; }
  static COREAI_HD M greater(F a, F b) { return {vcgtq_f32(a.half[0], b.half[0]), vcgtq_f32(a.half[1], b.half[1])}; }
  static COREAI_HD M unordered(F a, F b) {
    const M x = equal(a, a), y = equal(b, b);
    return {vmvnq_u32(vandq_u32(x.half[0], y.half[0])), vmvnq_u32(vandq_u32(x.half[1], y.half[1]))};
  }
  static COREAI_HD M mand(M a, M b) { return {vandq_u32(a.half[0], b.half[0]), vandq_u32(a.half[1], b.half[1])}; }
  static COREAI_HD M mor(M a, M b) { return {vorrq_u32(a.half[0], b.half[0]), vorrq_u32(a.half[1], b.half[1])}; }
  static COREAI_HD M none() { return {vdupq_n_u32(0), vdupq_n_u32(0)}; }
  static COREAI_HD bool any(M m) { return vmaxvq_u32(vorrq_u32(m.half[0], m.half[1])) != 0; }
  // Each lane keeps one bit of its mask; their sum has them all.
  static COREAI_HD uint32_t bits(M m) {
    const uint32x4_t place = {0x11, 0x22, 0x44, 0x88};
    return vaddvq_u32(vandq_u32(bytes_of(m, 0xf), place));
  }
  static COREAI_HD uint32_t bits(M a, M b) {
    const uint32x4_t place = {0x1111, 0x2222, 0x4444, 0x8888};
    const uint32x4_t both = vbslq_u32(vdupq_n_u32(0xff), bytes_of(a, 0xf), bytes_of(b, 0xf00));
    return vaddvq_u32(vandq_u32(both, place));
  }
  static COREAI_HD M from_bits(uint32_t bits) {
    const uint32x4_t all = vdupq_n_u32(bits), low = {1, 2, 4, 8}, high = {16, 32, 64, 128};
    return {vtstq_u32(all, low), vtstq_u32(all, high)};
  }
  static COREAI_HD F select(M m, F a, F b) {
    return {vbslq_f32(m.half[0], a.half[0], b.half[0]), vbslq_f32(m.half[1], a.half[1], b.half[1])};
  }
  static COREAI_HD I as_int(F a) { return {vreinterpretq_s32_f32(a.half[0]), vreinterpretq_s32_f32(a.half[1])}; }
  static COREAI_HD F as_float(I a) { return {vreinterpretq_f32_s32(a.half[0]), vreinterpretq_f32_s32(a.half[1])}; }
  static COREAI_HD I iand(I a, I b) { return {vandq_s32(a.half[0], b.half[0]), vandq_s32(a.half[1], b.half[1])}; }
  static COREAI_HD I ior(I a, I b) { return {vorrq_s32(a.half[0], b.half[0]), vorrq_s32(a.half[1], b.half[1])}; }
  static COREAI_HD I iadd(I a, I b) { return {vaddq_s32(a.half[0], b.half[0]), vaddq_s32(a.half[1], b.half[1])}; }
  static COREAI_HD I imax(I a, I b) { return {vmaxq_s32(a.half[0], b.half[0]), vmaxq_s32(a.half[1], b.half[1])}; }
  static COREAI_HD I imin(I a, I b) { return {vminq_s32(a.half[0], b.half[0]), vminq_s32(a.half[1], b.half[1])}; }
  template <int kBits>
  static COREAI_HD I shr(I a) {
    return {vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.half[0]), kBits)),
            vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.half[1]), kBits))};
  }
  template <int kBits>
  static COREAI_HD I shl(I a) {
    return {vshlq_n_s32(a.half[0], kBits), vshlq_n_s32(a.half[1], kBits)};
  }
  static COREAI_HD F to_float(I a) { return {vcvtq_f32_s32(a.half[0]), vcvtq_f32_s32(a.half[1])}; }
  // Half to even; of what 32 bits hold.
  static COREAI_HD I nearest(F a) { return {vcvtnq_s32_f32(a.half[0]), vcvtnq_s32_f32(a.half[1])}; }
  static COREAI_HD I truncate(F a) {  // NaN becomes INT32_MIN
    const M number = equal(a, a);
    const int32x4_t least = vdupq_n_s32(INT32_MIN);
    return {vbslq_s32(number.half[0], vcvtq_s32_f32(a.half[0]), least),
            vbslq_s32(number.half[1], vcvtq_s32_f32(a.half[1]), least)};
  }
  static COREAI_HD F round_half(F a) {
    return {vcvt_f32_f16(vcvt_f16_f32(a.half[0])), vcvt_f32_f16(vcvt_f16_f32(a.half[1]))};
  }

  static COREAI_HD F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static COREAI_HD void store(float* p, F a) { vst1q_f32(p, a.half[0]), vst1q_f32(p + 4, a.half[1]); }
  static COREAI_HD F load(const BFloat16* p) {
    const uint16x8_t words = vld1q_u16(reinterpret_cast<const uint16_t*>(p));
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(words), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(words, 16))};
  }
  static COREAI_HD void store(BFloat16* p, F a) {
    const M number = equal(a, a);
    const uint16x8_t is_number = vuzp1q_u16(vreinterpretq_u16_u32(number.half[0]), vreinterpretq_u16_u32(number.half[1]));
    store_words(p, vbslq_u16(is_number, rounded_words(a), vdupq_n_u16(0x7fc0)));
  }
  static COREAI_HD F load(const Float16* p) {
    const float16x8_t words = vreinterpretq_f16_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
    return {vcvt_f32_f16(vget_low_f16(words)), vcvt_high_f32_f16(words)};
  }
  static COREAI_HD void store(Float16* p, F a) {
    store_words(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(a.half[0]), a.half[1])));
  }
  static COREAI_HD F load(const double* p) {
    return {vcvt_high_f32_f64(vcvt_f32_f64(vld1q_f64(p)), vld1q_f64(p + 2)),
            vcvt_high_f32_f64(vcvt_f32_f64(vld1q_f64(p + 4)), vld1q_f64(p + 6))};
  }
  static COREAI_HD void store(double* p, F a) {
    for (int i = 0; i < 2; ++i) {
      vst1q_f64(p + 4 * i, vcvt_f64_f32(vget_low_f32(a.half[i])));
      vst1q_f64(p + 4 * i + 2, vcvt_high_f64_f32(a.half[i]));
    }
  }
  // The low byte of each lane.
  static COREAI_HD I load_bytes(const uint8_t* p) {
    const uint16x8_t words = vmovl_u8(vld1_u8(p));
    return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(words))), vreinterpretq_s32_u32(vmovl_high_u16(words))};
  }
  static COREAI_HD void store_bytes(uint8_t* p, I a) {
    vst1_u8(p, vmovn_u16(vuzp1q_u16(vreinterpretq_u16_s32(a.half[0]), vreinterpretq_u16_s32(a.half[1]))));
  }
  static COREAI_HD I load(const int32_t* p) { return {vld1q_s32(p), vld1q_s32(p + 4)}; }
  static COREAI_HD void store(int32_t* p, I a) { vst1q_s32(p, a.half[0]), vst1q_s32(p + 4, a.half[1]); }

  // From the even and the odd lanes of two vectors to the vectors, and back.
  static COREAI_HD void interleave(I& a, I& b) {
    const I even = a, odd = b;
    a = {vzip1q_s32(even.half[0], odd.half[0]), vzip2q_s32(even.half[0], odd.half[0])};
    b = {vzip1q_s32(even.half[1], odd.half[1]), vzip2q_s32(even.half[1], odd.half[1])};
  }
  static COREAI_HD void deinterleave(F& a, F& b) {
    const F first = a, second = b;
    a = {vuzp1q_f32(first.half[0], first.half[1]), vuzp1q_f32(second.half[0], second.half[1])};
    b = {vuzp2q_f32(first.half[0], first.half[1]), vuzp2q_f32(second.half[0], second.half[1])};
  }

  // Two neighbouring vectors.
  template <class T>
  static COREAI_HD void store_pair(T* p, F a, F b) {
    store(p, a);
    store(p + kWidth, b);
  }
  // The same of numbers: no NaN among them.
  template <class T>
  static COREAI_HD void store_pair_of_numbers(T* p, F a, F b) {
    store_pair(p, a, b);
  }
  static COREAI_HD void store_pair_of_numbers(BFloat16* p, F a, F b) {
    store_words(p, rounded_words(a));
    store_words(p + kWidth, rounded_words(b));
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
    return reduce_rows(
        v, [](float32x4_t a, float32x4_t b) __attribute__((always_inline)) { return vminq_f32(a, b); },
        [](float32x4_t a, float32x4_t b) __attribute__((always_inline)) { return vpminq_f32(a, b); });
  }
  static COREAI_HD F max_of_rows(const F* v) {
    return reduce_rows(
        v, [](float32x4_t a, float32x4_t b) __attribute__((always_inline)) { return vmaxq_f32(a, b); },
        [](float32x4_t a, float32x4_t b) __attribute__((always_inline)) { return vpmaxq_f32(a, b); });
  }
  static constexpr bool kHasWordRows = false;

 private:
  // Of both halves of a mask one bit each lane: `kept` of the first, the others of the second.
  static COREAI_HD uint32x4_t bytes_of(M m, uint32_t kept) { return vbslq_u32(vdupq_n_u32(kept), m.half[0], m.half[1]); }
  static COREAI_HD void store_words(void* p, uint16x8_t words) { vst1q_u16(static_cast<uint16_t*>(p), words); }
  // The nearest bfloat16 of each lane, ties to even: what the sum with half of the last bit kept has in its upper half.
  static COREAI_HD uint16x8_t rounded_words(F a) {
    const uint32x4_t odd = vdupq_n_u32(0x10000), less_than_half = vdupq_n_u32(0x7fff);
    const uint32x4_t x = vreinterpretq_u32_f32(a.half[0]), y = vreinterpretq_u32_f32(a.half[1]);
    const uint32x4_t x_up = vsraq_n_u32(x, vandq_u32(x, odd), 16), y_up = vsraq_n_u32(y, vandq_u32(y, odd), 16);
    return vaddhn_high_u32(vaddhn_u32(x_up, less_than_half), y_up, less_than_half);
  }
  // Each level of pairs doubles the rows that one register holds.
  template <class Combine, class CombinePairs>
  static COREAI_HD F reduce_rows(const F* v, Combine combine, CombinePairs pairs) {
    F result;
    for (int i = 0; i < 2; ++i) {
      float32x4_t row[4];
      for (int j = 0; j < 4; ++j) row[j] = combine(v[4 * i + j].half[0], v[4 * i + j].half[1]);
      result.half[i] = pairs(pairs(row[0], row[1]), pairs(row[2], row[3]));
    }
    return result;
  }
};

}  // namespace coreai::cpu::COREAI_ISA
