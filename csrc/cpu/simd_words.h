// Vectors of integer words, for kernels that look at elements as bits. The widest that the instruction set has; the
// compiler's own vector types, and instructions by name where it has no word for them.
#pragma once

#include "common/types.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace coreai::cpu::COREAI_ISA {

#if defined(__AVX512BW__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <int kBytes>
struct SignedWord;
template <>
struct SignedWord<2> {
  using type = int16_t;
  using unsigned_type = uint16_t;
};
template <>
struct SignedWord<4> {
  using type = int32_t;
  using unsigned_type = uint32_t;
};
template <>
struct SignedWord<8> {
  using type = int64_t;
  using unsigned_type = uint64_t;
};

// The same bits as a vector of another type. Some instruction sets have structures for vectors, and no cast of them
// compiles, not even in a template that is never used.
template <class To, class From>
COREAI_HD To bits_as(From a) {
  To result = {};
  __builtin_memcpy(&result, &a, sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
  return result;
}

// Lanes of one word of kBytes each. Signed: that is the comparison that every instruction set has.
template <int kBytes>
struct Words {
  using Word = typename SignedWord<kBytes>::type;
  static constexpr int kLanes = kVectorBytes / kBytes;
  typedef Word V __attribute__((vector_size(kVectorBytes)));
  typedef typename SignedWord<kBytes>::unsigned_type Unsigned __attribute__((vector_size(kVectorBytes)));

  static COREAI_HD V load(const void* p) {
    V result;
    __builtin_memcpy(&result, p, sizeof(result));
    return result;
  }
  static COREAI_HD void store(void* p, V a) { __builtin_memcpy(p, &a, sizeof(a)); }
  static COREAI_HD V set(Word x) { return V{} + x; }
  static COREAI_HD V min(V a, V b) {
#if defined(__AVX512BW__)
    if constexpr (kBytes == 2) return (V)_mm512_min_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    if constexpr (kBytes == 2) return (V)_mm256_min_epi16((__m256i)a, (__m256i)b);
#elif defined(__ARM_NEON)
    if constexpr (kBytes == 2) return (V)vminq_s16((int16x8_t)a, (int16x8_t)b);
#endif
    return a < b ? a : b;
  }
  // Of the words as numbers without a sign.
  static COREAI_HD V min_unsigned(V a, V b) {
#if defined(__AVX512BW__)
    if constexpr (kBytes == 2) return (V)_mm512_min_epu16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    if constexpr (kBytes == 2) return (V)_mm256_min_epu16((__m256i)a, (__m256i)b);
#elif defined(__ARM_NEON)
    if constexpr (kBytes == 2) return (V)vminq_u16((uint16x8_t)a, (uint16x8_t)b);
#endif
    const V sign = set(static_cast<Word>(Word{1} << (8 * kBytes - 1)));
    return (a ^ sign) < (b ^ sign) ? a : b;
  }
  static COREAI_HD V max_unsigned(V a, V b) {
#if defined(__AVX512BW__)
    if constexpr (kBytes == 2) return (V)_mm512_max_epu16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    if constexpr (kBytes == 2) return (V)_mm256_max_epu16((__m256i)a, (__m256i)b);
#elif defined(__ARM_NEON)
    if constexpr (kBytes == 2) return (V)vmaxq_u16((uint16x8_t)a, (uint16x8_t)b);
#endif
    const V sign = set(static_cast<Word>(Word{1} << (8 * kBytes - 1)));
    return (a ^ sign) > (b ^ sign) ? a : b;
  }
  static COREAI_HD V max(V a, V b) {
#if defined(__AVX512BW__)
    if constexpr (kBytes == 2) return (V)_mm512_max_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    if constexpr (kBytes == 2) return (V)_mm256_max_epi16((__m256i)a, (__m256i)b);
#elif defined(__ARM_NEON)
    if constexpr (kBytes == 2) return (V)vmaxq_s16((int16x8_t)a, (int16x8_t)b);
#endif
    return a > b ? a : b;
  }

#if defined(__AVX512BW__)
  using M = uint32_t;  // one bit a lane
  static COREAI_HD M greater(V a, V b) {
    const auto x = (__m512i)a, y = (__m512i)b;
    if constexpr (kBytes == 2) return _mm512_cmpgt_epi16_mask(x, y);
    if constexpr (kBytes == 4) return _mm512_cmpgt_epi32_mask(x, y);
    return _mm512_cmpgt_epi64_mask(x, y);
  }
  static COREAI_HD M equal(V a, V b) {
    const auto x = (__m512i)a, y = (__m512i)b;
    if constexpr (kBytes == 2) return _mm512_cmpeq_epi16_mask(x, y);
    if constexpr (kBytes == 4) return _mm512_cmpeq_epi32_mask(x, y);
    return _mm512_cmpeq_epi64_mask(x, y);
  }
  // a less one where m is set.
  static COREAI_HD V less_one(V a, M m) {
    const auto x = (__m512i)a, one = (__m512i)set(1);
    if constexpr (kBytes == 2) return (V)_mm512_mask_sub_epi16(x, m, x, one);
    if constexpr (kBytes == 4) return (V)_mm512_mask_sub_epi32(x, static_cast<__mmask16>(m), x, one);
    return (V)_mm512_mask_sub_epi64(x, static_cast<__mmask8>(m), x, one);
  }
  // The same of lanes that are at least zero, and stay so.
  static COREAI_HD V less_one_down_to_zero(V a, M m) {
    const auto x = (__m512i)a, one = (__m512i)set(1);
    if constexpr (kBytes == 2) return (V)_mm512_mask_subs_epu16(x, m, x, one);
    return max(less_one(a, m), V{});
  }
  static COREAI_HD V plus_one(V a, M m) {
    const auto x = (__m512i)a, one = (__m512i)set(1);
    if constexpr (kBytes == 2) return (V)_mm512_mask_add_epi16(x, m, x, one);
    if constexpr (kBytes == 4) return (V)_mm512_mask_add_epi32(x, static_cast<__mmask16>(m), x, one);
    return (V)_mm512_mask_add_epi64(x, static_cast<__mmask8>(m), x, one);
  }
  static COREAI_HD V where(M m, V a) {
    const auto x = (__m512i)a;
    if constexpr (kBytes == 2) return (V)_mm512_maskz_mov_epi16(m, x);
    if constexpr (kBytes == 4) return (V)_mm512_maskz_mov_epi32(static_cast<__mmask16>(m), x);
    return (V)_mm512_maskz_mov_epi64(static_cast<__mmask8>(m), x);
  }
  static COREAI_HD uint64_t bits(M m) { return m; }
  static COREAI_HD M from_bits(uint32_t bits) { return bits; }
  // The larger lanes into a, the smaller into b: what is not the larger is what is left of the two.
  static COREAI_HD void exchange(V& a, V& b) {
    const auto x = (__m512i)a, y = (__m512i)b;
    const auto most = kBytes == 2 ? _mm512_max_epi16(x, y) : kBytes == 4 ? _mm512_max_epi32(x, y) : _mm512_max_epi64(x, y);
    a = (V)most, b = (V)_mm512_ternarylogic_epi64(x, y, most, 0x96);
  }
#else
  static COREAI_HD void exchange(V& a, V& b) {
    const V x = a, y = b;
    a = x > y ? x : y, b = x > y ? y : x;
  }
  using M = V;  // all bits of a lane set or clear
  static COREAI_HD M greater(V a, V b) { return a > b; }
  static COREAI_HD M equal(V a, V b) { return a == b; }
  static COREAI_HD V less_one(V a, M m) { return a + m; }
  static COREAI_HD V less_one_down_to_zero(V a, M m) { return max(a + m, V{}); }
  static COREAI_HD V plus_one(V a, M m) { return a - m; }
  static COREAI_HD V where(M m, V a) { return m & a; }
  static COREAI_HD M from_bits(uint32_t bits) {
    V lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<Word>(1 << i);
    return (set(static_cast<Word>(bits)) & lane) == lane;
  }
#if defined(__AVX2__)
  static COREAI_HD uint64_t bits(M m) {
    const auto x = (__m256i)m;
    if constexpr (kBytes == 2) {
      const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
      return static_cast<uint32_t>(_mm_movemask_epi8(bytes));
    }
    if constexpr (kBytes == 4) return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(x)));
    return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(x)));
  }
#elif defined(__ARM_NEON)
  static COREAI_HD uint64_t bits(M m) {
    V lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<Word>(1 << i);
    lane &= m;
    if constexpr (kBytes == 2) return vaddvq_u16((uint16x8_t)lane);
    if constexpr (kBytes == 4) return vaddvq_u32((uint32x4_t)lane);
    return vaddvq_u64((uint64x2_t)lane);
  }
#else
  static COREAI_HD uint64_t bits(M m) {
    V lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<Word>(1 << i);
    lane &= m;
    uint64_t half[2];
    __builtin_memcpy(half, &lane, sizeof(half));
    uint64_t all = half[0] | half[1];
    if constexpr (kBytes <= 4) all |= all >> 32;
    if constexpr (kBytes <= 2) all |= all >> 16;
    return all & ((1u << kLanes) - 1u);
  }
#endif
#endif
};

}  // namespace coreai::cpu::COREAI_ISA
