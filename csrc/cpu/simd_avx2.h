// Eight float32 lanes: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "common/element.h"

namespace coreai::cpu::COREAI_ISA {

struct Simd {
  static constexpr int kWidth = 8;
  static constexpr bool kHasQuotient = false;  // a division is as quick
  using F = __m256;
  using I = __m256i;
  using M = __m256;  // all bits of a lane set or clear

  static COREAI_HD F set(float x) { return _mm256_set1_ps(x); }
  static COREAI_HD I iset(int32_t x) { return _mm256_set1_epi32(x); }
  static COREAI_HD F add(F a, F b) { return _mm256_add_ps(a, b); }
  static COREAI_HD F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static COREAI_HD F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  // a * b + 0.0: one rounding, with or without a fused operation.
  static COREAI_HD F mul_add_zero(F a, F b) { return _mm256_fmadd_ps(a, b, _mm256_setzero_ps()); }
  static constexpr bool kHasBf16Products = true;  // see packed_bf16.h
  static COREAI_HD F near_reciprocal(F a) { return div(set(1.0f), a); }
  static COREAI_HD F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static COREAI_HD F div(F a, F b) { return _mm256_div_ps(a, b); }
  static COREAI_HD F min(F a, F b) { return _mm256_min_ps(a, b); }
  static COREAI_HD F max(F a, F b) { return _mm256_max_ps(a, b); }
  static COREAI_HD F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static COREAI_HD M equal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static COREAI_HD M greater(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  static COREAI_HD M unordered(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_UNORD_Q); }
  static COREAI_HD M mand(M a, M b) { return _mm256_and_ps(a, b); }
  static COREAI_HD M mor(M a, M b) { return _mm256_or_ps(a, b); }
  static COREAI_HD M none() { return _mm256_setzero_ps(); }
  static COREAI_HD bool any(M m) { return _mm256_movemask_ps(m) != 0; }
  static COREAI_HD uint32_t bits(M m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
  static COREAI_HD M from_bits(uint32_t bits) {
    const I lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const I all = _mm256_set1_epi32(static_cast<int32_t>(bits));
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, lane), lane));
  }
  static COREAI_HD F select(M m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
  static COREAI_HD I as_int(F a) { return _mm256_castps_si256(a); }
  static COREAI_HD F as_float(I a) { return _mm256_castsi256_ps(a); }
  static COREAI_HD I iand(I a, I b) { return _mm256_and_si256(a, b); }
  static COREAI_HD I ior(I a, I b) { return _mm256_or_si256(a, b); }
  static COREAI_HD I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
  static COREAI_HD I imax(I a, I b) { return _mm256_max_epi32(a, b); }
  static COREAI_HD I imin(I a, I b) { return _mm256_min_epi32(a, b); }
  template <int kBits>
  static COREAI_HD I shr(I a) {
    return _mm256_srli_epi32(a, kBits);
  }
  template <int kBits>
  static COREAI_HD I shl(I a) {
    return _mm256_slli_epi32(a, kBits);
  }
  static COREAI_HD F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static COREAI_HD I nearest(F a) { return _mm256_cvtps_epi32(a); }    // half to even; of what 32 bits hold
  static COREAI_HD I truncate(F a) { return _mm256_cvttps_epi32(a); }  // NaN becomes INT32_MIN
  static COREAI_HD F round_half(F a) { return _mm256_cvtph_ps(_mm256_cvtps_ph(a, 0)); }

  static COREAI_HD F load(const float* p) { return _mm256_loadu_ps(p); }
  static COREAI_HD void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static COREAI_HD F load(const BFloat16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }
  static COREAI_HD void store(BFloat16* p, F a) {
    const I words = rounded_words(a);
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
  }
  static COREAI_HD F load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static COREAI_HD void store(Float16* p, F a) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, 0)); }
  static COREAI_HD F load(const double* p) {
    return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(p + 4)), _mm256_cvtpd_ps(_mm256_loadu_pd(p)));
  }
  static COREAI_HD void store(double* p, F a) {
    _mm256_storeu_pd(p, _mm256_cvtps_pd(_mm256_castps256_ps128(a)));
    _mm256_storeu_pd(p + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
  }
  // The low byte of each lane.
  static COREAI_HD I load_bytes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
  static COREAI_HD void store_bytes(uint8_t* p, I a) {
    const I words = _mm256_shuffle_epi8(a, _mm256_set1_epi32(0x0c080400));
    const I quads = _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
    _mm_storel_epi64((__m128i*)p, _mm256_castsi256_si128(quads));
  }
  static COREAI_HD I load(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static COREAI_HD void store(int32_t* p, I a) { _mm256_storeu_si256((__m256i*)p, a); }

  // From the even and the odd lanes of two vectors to the vectors, and back.
  static COREAI_HD void interleave(I& a, I& b) {
    const I low = _mm256_unpacklo_epi32(a, b), high = _mm256_unpackhi_epi32(a, b);
    a = _mm256_permute2x128_si256(low, high, 0x20);
    b = _mm256_permute2x128_si256(low, high, 0x31);
  }
  static COREAI_HD void deinterleave(F& a, F& b) {
    const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
    const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd));
    a = _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8));
    b = _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8));
  }

  // Two neighbouring vectors.
  template <class T>
  static COREAI_HD void store_pair(T* p, F a, F b) {
    store(p, a);
    store(p + kWidth, b);
  }
  static COREAI_HD void store_pair(BFloat16* p, F a, F b) {
    const I packed = _mm256_packus_epi32(rounded_words(a), rounded_words(b));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
  }
  template <class T>
  static COREAI_HD void store_pair_of_numbers(T* p, F a, F b) {
    store_pair(p, a, b);
  }

  template <class T>
  static COREAI_HD F load_n(const T* p, int n) {
    alignas(32) T buffer[kWidth] = {};
    for (int i = 0; i < n; ++i) buffer[i] = p[i];
    return load(buffer);
  }
  template <class T>
  static COREAI_HD void store_n(T* p, F a, int n) {
    alignas(32) T buffer[kWidth];
    store(buffer, a);
    for (int i = 0; i < n; ++i) p[i] = buffer[i];
  }
  static COREAI_HD void store_n(int32_t* p, I a, int n) {
    alignas(32) int32_t buffer[kWidth];
    store(buffer, a);
    for (int i = 0; i < n; ++i) p[i] = buffer[i];
  }
  static COREAI_HD M first(int n) { return from_bits((1u << n) - 1u); }

  // Lane i of the result: the minimum (maximum) over the lanes of v[i]. No NaN among them.
  static COREAI_HD F min_of_rows(const F* v) {
    return reduce_rows(v, [](F a, F b) __attribute__((always_inline)) { return _mm256_min_ps(a, b); });
  }
  static COREAI_HD F max_of_rows(const F* v) {
    return reduce_rows(v, [](F a, F b) __attribute__((always_inline)) { return _mm256_max_ps(a, b); });
  }
  // The same for pairs of signed 16-bit words: each lane of the result holds two words that are still to be compared.
  static constexpr bool kHasWordRows = true;
  static COREAI_HD F min_of_word_rows(const F* v) {
    return reduce_rows(v, [](F a, F b) __attribute__((always_inline)) {
      return _mm256_castsi256_ps(_mm256_min_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b)));
    });
  }
  static COREAI_HD F max_of_word_rows(const F* v) {
    return reduce_rows(v, [](F a, F b) __attribute__((always_inline)) {
      return _mm256_castsi256_ps(_mm256_max_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b)));
    });
  }
  static COREAI_HD F unsigned_max_of_word_rows(const F* v) {
    return reduce_rows(v, [](F a, F b) __attribute__((always_inline)) {
      return _mm256_castsi256_ps(_mm256_max_epu16(_mm256_castps_si256(a), _mm256_castps_si256(b)));
    });
  }

 private:
  // The nearest bfloat16 of each lane, in its lower half.
  static COREAI_HD I rounded_words(F a) {
    const I bits = _mm256_castps_si256(a);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const I rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const I number = as_int(select(unordered(a, a), as_float(iset(0x7fc00000)), as_float(rounded)));
    return _mm256_srli_epi32(number, 16);
  }
  // A tree of shuffles: each level halves the vectors and doubles the rows that one vector holds.
  template <class Combine>
  static COREAI_HD F reduce_rows(const F* v, Combine combine) {
    F quads[2];
    for (int i = 0; i < 2; ++i) {
      const F ab = combine(_mm256_unpacklo_ps(v[4 * i], v[4 * i + 1]), _mm256_unpackhi_ps(v[4 * i], v[4 * i + 1]));
      const F cd = combine(_mm256_unpacklo_ps(v[4 * i + 2], v[4 * i + 3]), _mm256_unpackhi_ps(v[4 * i + 2], v[4 * i + 3]));
      const __m256d x = _mm256_castps_pd(ab), y = _mm256_castps_pd(cd);
      quads[i] = combine(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
    }
    return combine(_mm256_permute2f128_ps(quads[0], quads[1], 0x20), _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
  }
};

}  // namespace coreai::cpu::COREAI_ISA
