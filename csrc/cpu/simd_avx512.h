// Sixteen float32 lanes: AVX-512 F, BW, VL, DQ.
#pragma once

#include <immintrin.h>

#include "common/element.h"

namespace coreai::cpu::COREAI_ISA {

struct Simd {
  static constexpr int kWidth = 16;
  using F = __m512;
  using I = __m512i;
  using M = __mmask16;

  static COREAI_HD F set(float x) { return _mm512_set1_ps(x); }
  static COREAI_HD I iset(int32_t x) { return _mm512_set1_epi32(x); }
  static COREAI_HD F add(F a, F b) { return _mm512_add_ps(a, b); }
  static COREAI_HD F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static COREAI_HD F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  // a * b + 0.0: one rounding, with or without a fused operation.
  static COREAI_HD F mul_add_zero(F a, F b) { return _mm512_fmadd_ps(a, b, _mm512_setzero_ps()); }
  static constexpr bool kHasBf16Products = true;  // see packed_bf16.h
  // 1 / a, at most one unit in the last place off.
  static COREAI_HD F near_reciprocal(F a) {
    const F guess = _mm512_rcp14_ps(a);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(guess, a, set(1.0f)), guess, guess);
  }
  static COREAI_HD F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static COREAI_HD F div(F a, F b) { return _mm512_div_ps(a, b); }
  // a / b from the reciprocal of b, rounded to nearest: a product and one correction (P. Markstein, IBM J. Res. Dev.
  // 34, 1990), which take no time of the divider. They compare with every number of up to nine bits as the IEEE
  // quotient does: seen by trying all mantissas of b with all such numbers, and the four values of a on either side
  // of their product. Scaling changes nothing while b lies between 2^-64 and 2^64: remainders that become subnormal
  // are of quotients that everything rounds to zero.
  static constexpr bool kHasQuotient = true;
  // Of finite values whose product is finite. The correction turns -0.0 into 0.0.
  static COREAI_HD F finite_quotient(F a, F b, F reciprocal) {
    const F product = _mm512_mul_ps(a, reciprocal);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(product, b, a), reciprocal, product);
  }
  // Of any values: zeros, infinities and NaN are those of the product.
  static COREAI_HD F quotient(F a, F b, F reciprocal) {
    const F product = _mm512_mul_ps(a, reciprocal);
    const F corrected = _mm512_fmadd_ps(_mm512_fnmadd_ps(product, b, a), reciprocal, product);
    constexpr int kNan = 0x81, kZero = 0x06, kInfinity = 0x18;
    return _mm512_mask_blend_ps(_mm512_fpclass_ps_mask(product, kNan | kZero | kInfinity), corrected, product);
  }
  static COREAI_HD F with_sign_of(F a, F b) {
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b), _mm512_set1_epi32(INT32_MIN), 0xd8));
  }
  static COREAI_HD F min(F a, F b) { return _mm512_min_ps(a, b); }
  static COREAI_HD F max(F a, F b) { return _mm512_max_ps(a, b); }
  static COREAI_HD F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static COREAI_HD M equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static COREAI_HD M greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static COREAI_HD M unordered(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
  static COREAI_HD M mand(M a, M b) { return static_cast<M>(a & b); }
  static COREAI_HD M mor(M a, M b) { return static_cast<M>(a | b); }
  static COREAI_HD M none() { return 0; }
  static COREAI_HD bool any(M m) { return m != 0; }
  static COREAI_HD uint32_t bits(M m) { return m; }
  static COREAI_HD M from_bits(uint32_t bits) { return static_cast<M>(bits); }
  static COREAI_HD F select(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
  static COREAI_HD I as_int(F a) { return _mm512_castps_si512(a); }
  static COREAI_HD F as_float(I a) { return _mm512_castsi512_ps(a); }
  static COREAI_HD I iand(I a, I b) { return _mm512_and_si512(a, b); }
  static COREAI_HD I ior(I a, I b) { return _mm512_or_si512(a, b); }
  static COREAI_HD I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
  static COREAI_HD I imax(I a, I b) { return _mm512_max_epi32(a, b); }
  static COREAI_HD I imin(I a, I b) { return _mm512_min_epi32(a, b); }
  template <int kBits>
  static COREAI_HD I shr(I a) {
    return _mm512_srli_epi32(a, kBits);
  }
  template <int kBits>
  static COREAI_HD I shl(I a) {
    return _mm512_slli_epi32(a, kBits);
  }
  static COREAI_HD F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static COREAI_HD I nearest(F a) { return _mm512_cvtps_epi32(a); }    // half to even; of what 32 bits hold
  static COREAI_HD I truncate(F a) { return _mm512_cvttps_epi32(a); }  // NaN becomes INT32_MIN
  static COREAI_HD F round_bfloat16(F a) {
    const F kept = _mm512_castsi512_ps(_mm512_and_si512(rounded_numbers(a), _mm512_set1_epi32(-0x10000)));
    return _mm512_mask_mov_ps(a, _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), kept);
  }
  static COREAI_HD F round_half(F a) { return _mm512_cvtph_ps(_mm512_cvtps_ph(a, 0)); }

  static COREAI_HD F load(const float* p) { return _mm512_loadu_ps(p); }
  static COREAI_HD void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static COREAI_HD F load(const BFloat16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  static COREAI_HD void store(BFloat16* p, F a) { _mm256_storeu_si256((__m256i*)p, narrow(a)); }
  static COREAI_HD F load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static COREAI_HD void store(Float16* p, F a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, 0)); }
  static COREAI_HD F load(const double* p) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(_mm512_loadu_pd(p))),
                              _mm512_cvtpd_ps(_mm512_loadu_pd(p + 8)), 1);
  }
  static COREAI_HD void store(double* p, F a) {
    _mm512_storeu_pd(p, _mm512_cvtps_pd(_mm512_castps512_ps256(a)));
    _mm512_storeu_pd(p + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)));
  }
  // The low byte of each lane.
  static COREAI_HD I load_bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
  static COREAI_HD void store_bytes(uint8_t* p, I a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }
  static COREAI_HD I load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static COREAI_HD void store(int32_t* p, I a) { _mm512_storeu_si512(p, a); }

  // From the even and the odd lanes of two vectors to the vectors, and back.
  static COREAI_HD void interleave(I& a, I& b) {
    const I even = a;
    a = _mm512_permutex2var_epi32(even, interleaved(0), b);
    b = _mm512_permutex2var_epi32(even, interleaved(kWidth / 2), b);
  }
  static COREAI_HD void deinterleave(F& a, F& b) {
    const F first = a;
    a = _mm512_permutex2var_ps(first, every_other(0), b);
    b = _mm512_permutex2var_ps(first, every_other(1), b);
  }

  // Two neighbouring vectors.
  template <class T>
  static COREAI_HD void store_pair(T* p, F a, F b) {
    store(p, a);
    store(p + kWidth, b);
  }
  static COREAI_HD void store_pair(BFloat16* p, F a, F b) {
    _mm512_storeu_si512(p, _mm512_permutex2var_epi16(rounded_words(a), upper_halves(), rounded_words(b)));
  }
  // The same of numbers: no NaN among them.
  template <class T>
  static COREAI_HD void store_pair_of_numbers(T* p, F a, F b) {
    store_pair(p, a, b);
  }
  static COREAI_HD void store_pair_of_numbers(BFloat16* p, F a, F b) {
    _mm512_storeu_si512(p, _mm512_permutex2var_epi16(rounded_numbers(a), upper_halves(), rounded_numbers(b)));
  }

  static COREAI_HD F load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static COREAI_HD void store_n(float* p, F a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }
  static COREAI_HD F load_n(const BFloat16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
  static COREAI_HD void store_n(BFloat16* p, F a, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(a)); }
  static COREAI_HD F load_n(const Float16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
  static COREAI_HD void store_n(Float16* p, F a, int n) { _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(a, 0)); }
  static COREAI_HD F load_n(const double* p, int n) {
    alignas(64) double buffer[kWidth] = {};
    for (int i = 0; i < n; ++i) buffer[i] = p[i];
    return load(buffer);
  }
  static COREAI_HD void store_n(double* p, F a, int n) {
    alignas(64) double buffer[kWidth];
    store(buffer, a);
    for (int i = 0; i < n; ++i) p[i] = buffer[i];
  }
  static COREAI_HD void store_n(int32_t* p, I a, int n) { _mm512_mask_storeu_epi32(p, first(n), a); }
  static COREAI_HD M first(int n) { return static_cast<M>((1u << n) - 1u); }

  // Lane i of the result: the minimum (maximum) over the lanes of v[i]. No NaN among them.
  static COREAI_HD F min_of_rows(const F* v) {
    return reduce_rows(v, [](F a, F b) __attribute__((always_inline)) { return _mm512_min_ps(a, b); });
  }
  static COREAI_HD F max_of_rows(const F* v) {
    return reduce_rows(v, [](F a, F b) __attribute__((always_inline)) { return _mm512_max_ps(a, b); });
  }
  // The same for pairs of signed 16-bit words: each lane of the result holds two words that are still to be compared.
  static constexpr bool kHasWordRows = true;
  static COREAI_HD F min_of_word_rows(const F* v) {
    return reduce_rows(v, [](F a, F b) __attribute__((always_inline)) {
      return _mm512_castsi512_ps(_mm512_min_epi16(_mm512_castps_si512(a), _mm512_castps_si512(b)));
    });
  }
  static COREAI_HD F max_of_word_rows(const F* v) {
    return reduce_rows(v, [](F a, F b) __attribute__((always_inline)) {
      return _mm512_castsi512_ps(_mm512_max_epi16(_mm512_castps_si512(a), _mm512_castps_si512(b)));
    });
  }
  static COREAI_HD F unsigned_max_of_word_rows(const F* v) {
    return reduce_rows(v, [](F a, F b) __attribute__((always_inline)) {
      return _mm512_castsi512_ps(_mm512_max_epu16(_mm512_castps_si512(a), _mm512_castps_si512(b)));
    });
  }

 private:
  static COREAI_HD I interleaved(int from) {
    const I lane = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return _mm512_add_epi32(lane, _mm512_set1_epi32(from));
  }
  static COREAI_HD I every_other(int from) {
    const I lane = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_add_epi32(lane, _mm512_set1_epi32(from));
  }
  static COREAI_HD F widen(__m256i a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16)); }
  // Not vcvtneps2bf16: that one flushes subnormals.
  static COREAI_HD __m256i narrow(F a) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_words(a), 16)); }
  static COREAI_HD I upper_halves() {
    alignas(64) static constexpr uint16_t kIndex[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                        33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return _mm512_load_si512(kIndex);
  }
  static COREAI_HD I rounded_numbers(F a) {
    const I bits = _mm512_castps_si512(a);
    const M odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const I sum = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_sub_epi32(sum, odd, sum, _mm512_set1_epi32(-1));
  }
  // The upper half of each lane: the nearest bfloat16.
  static COREAI_HD I rounded_words(F a) {
    const I bits = _mm512_castps_si512(a);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const M number = _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q);
    return _mm512_mask_add_epi32(_mm512_set1_epi32(0x7fc00000), number, bits,
                                 _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  }
  // Half of the lanes of each of two vectors, combined with the other half: those at a distance of kDistance.
  template <int kDistance, class Combine>
  static COREAI_HD F halves(F a, F b, Combine combine) {
    constexpr M kUpper = kDistance == 1 ? 0xaaaa : kDistance == 2 ? 0xcccc : kDistance == 4 ? 0xf0f0 : 0xff00;
    alignas(64) static constexpr auto kIndex = [] {
      Indices i{};
      for (int lane = 0; lane < kWidth; ++lane)
        i.lane[lane] = (lane & kDistance) ? lane + kWidth - kDistance : lane + kDistance;
      return i;
    }();
    // A blend and one shuffle: shuffles have a single port.
    return combine(_mm512_mask_blend_ps(kUpper, a, b), _mm512_permutex2var_ps(a, _mm512_load_si512(kIndex.lane), b));
  }
  struct Indices {
    int32_t lane[kWidth];
  };
  // A tree: each level halves the vectors and doubles the rows that one vector holds.
  template <class Combine>
  static COREAI_HD F reduce_rows(const F* v, Combine combine) {
    F eight[8], four[4];
    for (int i = 0; i < 8; ++i) eight[i] = halves<8>(v[i], v[i + 8], combine);
    for (int i = 0; i < 4; ++i) four[i] = halves<4>(eight[i], eight[i + 4], combine);
    const F even = halves<2>(four[0], four[2], combine), odd = halves<2>(four[1], four[3], combine);
    return halves<1>(even, odd, combine);
  }
};

}  // namespace coreai::cpu::COREAI_ISA
