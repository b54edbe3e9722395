// Square matrices of words, turned by exchanging ever larger blocks off the diagonal (Eklundh 1972).
#pragma once

#include "cpu/simd_words.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

// Whether one shuffle does what `swap` does to a vector, whatever the words.
#if defined(__ARM_NEON)
constexpr bool kHasTransposes = true;  // TRN1 and TRN2
#else
constexpr bool kHasTransposes = false;
#endif

template <class W>
struct Transpose {
  using V = typename W::V;
  using Word = typename W::Word;
  static constexpr int kLanes = W::kLanes;

  // Vectors as rows of matrices of kSize words, side by side: writes to rows[i] the i-th columns of row(0), row(1), ...
  template <int kSize = kLanes, class Row>
  static COREAI_HD void of(V* rows, Row row) {
    // First blocks within quads of rows, then among rows four apart: eight registers at a time at most.
    constexpr int kQuad = kSize < 4 ? kSize : 4;
#pragma GCC unroll 8
    for (int i = 0; i < kSize; i += kQuad) levels<1, kQuad>(rows + i, [&](int j) { return row(i + j); });
    if constexpr (kSize > kQuad) {
#pragma GCC unroll 4
      for (int i = 0; i < kQuad; ++i) levels<kQuad, kSize>(rows + i, [&](int j) { return rows[i + j]; });
    }
  }

 private:
  // Rows kFrom apart, kEnd / kFrom of them.
  template <int kFrom, int kEnd, class Row>
  static COREAI_HD void levels(V* rows, Row row) {
    V r[kEnd / kFrom];
#pragma GCC unroll 8
    for (int i = 0; i < kEnd / kFrom; ++i) r[i] = row(i * kFrom);
    level<kFrom, kFrom, kEnd>(r);
#pragma GCC unroll 8
    for (int i = 0; i < kEnd / kFrom; ++i) rows[i * kFrom] = r[i];
  }
  template <int kDistance, int kFrom, int kEnd>
  static COREAI_HD void level(V* r) {
    if constexpr (kDistance < kEnd) {
#pragma GCC unroll 8
      for (int i = 0; i < kEnd / kFrom; ++i) {
        if ((i * kFrom & kDistance) == 0) swap<kDistance>(r[i], r[i + kDistance / kFrom]);
      }
      level<2 * kDistance, kFrom, kEnd>(r);
    }
  }

  // Exchanges the odd ones of a's blocks of kDistance lanes with the even ones of b's.
  template <int kDistance>
  static COREAI_HD void swap(V& a, V& b) {
    constexpr int kMoved = kDistance * sizeof(Word);
    if constexpr (kMoved <= 4 && !kHasTransposes) {
      // Shuffles share a port of the processor, or there are none of so small words; shifts and blends need neither.
#if defined(__AVX512BW__)
      const auto x = (__m512i)a, y = (__m512i)b;
      if constexpr (kMoved == 2) {
        a = (V)_mm512_mask_blend_epi16(0xaaaaaaaa, x, _mm512_slli_epi32(y, 16));
        b = (V)_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(x, 16), y);
      } else {
        a = (V)_mm512_mask_blend_epi32(0xaaaa, x, _mm512_slli_epi64(y, 32));
        b = (V)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(x, 32), y);
      }
#elif defined(__AVX2__)
      const auto x = (__m256i)a, y = (__m256i)b;
      if constexpr (kMoved == 2) {
        a = (V)_mm256_blend_epi16(x, _mm256_slli_epi32(y, 16), 0xaa);
        b = (V)_mm256_blend_epi16(_mm256_srli_epi32(x, 16), y, 0xaa);
      } else {
        a = (V)_mm256_blend_epi32(x, _mm256_slli_epi64(y, 32), 0xaa);
        b = (V)_mm256_blend_epi32(_mm256_srli_epi64(x, 32), y, 0xaa);
      }
#else
      using Twice = typename Words<2 * kMoved>::V;
      using Unsigned = typename Words<2 * kMoved>::Unsigned;
      constexpr int kBits = 8 * kMoved;
      const Twice low = Words<2 * kMoved>::set((typename Words<2 * kMoved>::Word{1} << kBits) - 1);
      const Twice x = (Twice)a, y = (Twice)b;
      a = (V)((x & low) | (y << kBits));
      b = (V)((Twice)((Unsigned)x >> kBits) | (y & ~low));
#endif
      return;
    }
    // As the widest words that move as one.
    constexpr int kBytes = kDistance * sizeof(Word) < 8 ? kDistance * sizeof(Word) : 8;
    constexpr int kWords = kVectorBytes / kBytes, kStep = kDistance * sizeof(Word) / kBytes;
    using U = typename Words<kBytes>::V;
    const U u = (U)a, v = (U)b;
    U first, second;
#if defined(__clang__)
    for (int i = 0; i < kWords; ++i) {
      first[i] = (i & kStep) == 0 ? u[i] : v[i ^ kStep];
      second[i] = (i & kStep) == 0 ? u[i ^ kStep] : v[i];
    }
#else
    U even, odd;
#pragma GCC unroll 64
    for (int i = 0; i < kWords; ++i) {
      even[i] = (i & kStep) == 0 ? i : kWords + (i ^ kStep);
      odd[i] = (i & kStep) == 0 ? i ^ kStep : kWords + i;
    }
    first = __builtin_shuffle(u, v, even);
    second = __builtin_shuffle(u, v, odd);
#endif
    a = (V)first, b = (V)second;
  }
};

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
