// Tables of 16, 32 or 256 words, looked up a vector at a time: in registers where they fit there.
#pragma once

#include "cpu/loops.h"
#include "cpu/palettes/palette_kernels.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

// F at(I): the float32 of each lane's index.
template <TableKind kKind>
struct FloatTable;

// Words of 16 bits: where an instruction set has no quick lookup, kLanes is 0.
template <TableKind kKind>
struct WordTable {
  static constexpr int kLanes = 0;
  explicit WordTable(const uint16_t*) {}
  COREAI_HD void look_up(const uint8_t*, uint16_t*) const {}
};

#if defined(__AVX512F__)

template <>
struct FloatTable<TableKind::k16> {
  static constexpr bool kIsQuick = true;
  explicit FloatTable(const float* table) : entries(_mm512_loadu_ps(table)) {}
  COREAI_HD F at(I index) const { return _mm512_permutexvar_ps(index, entries); }
  F entries;
};

template <>
struct FloatTable<TableKind::k32> {
  static constexpr bool kIsQuick = true;
  explicit FloatTable(const float* table) : low(_mm512_loadu_ps(table)), high(_mm512_loadu_ps(table + 16)) {}
  COREAI_HD F at(I index) const { return _mm512_permutex2var_ps(low, index, high); }
  F low, high;
};

template <>
struct FloatTable<TableKind::k256> {
  static constexpr bool kIsQuick = true;
  explicit FloatTable(const float* table) : entries(table) {}
  COREAI_HD F at(I index) const { return _mm512_i32gather_ps(index, entries, 4); }
  const float* entries;
};

template <>
struct WordTable<TableKind::k32> {
  static constexpr int kLanes = 32;
  explicit WordTable(const uint16_t* table) : entries(_mm512_loadu_si512(table)) {}
  COREAI_HD void look_up(const uint8_t* indices, uint16_t* out) const {
    const I index = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)indices));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, entries));
  }
  I entries;
};

template <>
struct WordTable<TableKind::k16> : WordTable<TableKind::k32> {
  using WordTable<TableKind::k32>::WordTable;
};

template <>
struct WordTable<TableKind::k256> {
  static constexpr int kLanes = 32;
  explicit WordTable(const uint16_t* table) {
    for (int i = 0; i < 8; ++i) entries[i] = _mm512_loadu_si512(table + 32 * i);
  }
  COREAI_HD void look_up(const uint8_t* indices, uint16_t* out) const {
    const I index = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)indices));
    const __mmask32 bit6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
    const __mmask32 bit7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
    I quarter[4];
    for (int i = 0; i < 4; ++i) quarter[i] = _mm512_permutex2var_epi16(entries[2 * i], index, entries[2 * i + 1]);
    const I low = _mm512_mask_blend_epi16(bit6, quarter[0], quarter[1]);
    const I high = _mm512_mask_blend_epi16(bit6, quarter[2], quarter[3]);
    _mm512_storeu_si512(out, _mm512_mask_blend_epi16(bit7, low, high));
  }
  I entries[8];
};

#elif defined(__AVX2__)

template <>
struct FloatTable<TableKind::k16> {
  static constexpr bool kIsQuick = true;
  explicit FloatTable(const float* table) : low(_mm256_loadu_ps(table)), high(_mm256_loadu_ps(table + 8)) {}
  COREAI_HD F at(I index) const {
    const F bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), bit3);
  }
  F low, high;
};

template <>
struct FloatTable<TableKind::k256> {
  static constexpr bool kIsQuick = true;
  explicit FloatTable(const float* table) : entries(table) {}
  COREAI_HD F at(I index) const { return _mm256_i32gather_ps(entries, index, 4); }
  const float* entries;
};

template <>
struct FloatTable<TableKind::k32> : FloatTable<TableKind::k256> {
  using FloatTable<TableKind::k256>::FloatTable;
};

// The two bytes of a word are looked up apart, and interleaved.
template <>
struct WordTable<TableKind::k16> {
  static constexpr int kLanes = 16;
  explicit WordTable(const uint16_t* table) {
    alignas(16) uint8_t bytes[2][16];
    for (int i = 0; i < 16; ++i) {
      bytes[0][i] = static_cast<uint8_t>(table[i]);
      bytes[1][i] = static_cast<uint8_t>(table[i] >> 8);
    }
    low = _mm_load_si128((const __m128i*)bytes[0]);
    high = _mm_load_si128((const __m128i*)bytes[1]);
  }
  COREAI_HD void look_up(const uint8_t* indices, uint16_t* out) const {
    const __m128i index = _mm_loadu_si128((const __m128i*)indices);
    const __m128i a = _mm_shuffle_epi8(low, index), b = _mm_shuffle_epi8(high, index);
    _mm_storeu_si128((__m128i*)out, _mm_unpacklo_epi8(a, b));
    _mm_storeu_si128((__m128i*)(out + 8), _mm_unpackhi_epi8(a, b));
  }
  __m128i low, high;
};

#elif defined(__ARM_NEON)

// Tables are bytes, four registers of them a lookup, and an index beyond them gives zero.
template <>
struct FloatTable<TableKind::k16> {
  static constexpr bool kIsQuick = true;
  explicit FloatTable(const float* table) : entries(vld1q_u8_x4(reinterpret_cast<const uint8_t*>(table))) {}
  COREAI_HD F at(I index) const {
    return bytes_at(index, [&](uint8x16_t bytes) __attribute__((always_inline)) { return vqtbl4q_u8(entries, bytes); });
  }
  template <class LookUp>
  static COREAI_HD F bytes_at(I index, LookUp look_up) {
    float lanes[kWidth];
    int32_t indices[kWidth];
    Simd::store(indices, index);
    const uint32x4_t four = vdupq_n_u32(0x04040404), each = vdupq_n_u32(0x03020100);
    for (int i = 0; i < kWidth; i += 4) {
      const uint32x4_t first = vmlaq_u32(each, vreinterpretq_u32_s32(vld1q_s32(indices + i)), four);
      vst1q_f32(lanes + i, vreinterpretq_f32_u8(look_up(vreinterpretq_u8_u32(first))));
    }
    return Simd::load(lanes);
  }
  uint8x16x4_t entries;
};

template <>
struct FloatTable<TableKind::k32> {
  static constexpr bool kIsQuick = true;
  explicit FloatTable(const float* table)
      : low(vld1q_u8_x4(reinterpret_cast<const uint8_t*>(table))),
        high(vld1q_u8_x4(reinterpret_cast<const uint8_t*>(table + 16))) {}
  COREAI_HD F at(I index) const {
    return FloatTable<TableKind::k16>::bytes_at(index, [&](uint8x16_t bytes) __attribute__((always_inline)) {
      return vqtbx4q_u8(vqtbl4q_u8(low, bytes), high, vsubq_u8(bytes, vdupq_n_u8(64)));
    });
  }
  uint8x16x4_t low, high;
};

template <>
struct FloatTable<TableKind::k256> {
  static constexpr bool kIsQuick = false;
  explicit FloatTable(const float* table) : entries(table) {}
  COREAI_HD F at(I index) const {
    int32_t indices[kWidth];
    float lanes[kWidth];
    Simd::store(indices, index);
    for (int i = 0; i < kWidth; ++i) lanes[i] = entries[indices[i]];
    return Simd::load(lanes);
  }
  const float* entries;
};

// The two bytes of a word are looked up apart, and interleaved.
template <>
struct WordTable<TableKind::k32> {
  static constexpr int kLanes = 16;
  explicit WordTable(const uint16_t* table) {
    for (int i = 0; i < 2; ++i) {
      const uint8x16x2_t bytes = vld2q_u8(reinterpret_cast<const uint8_t*>(table + 16 * i));
      low.val[i] = bytes.val[0], high.val[i] = bytes.val[1];
    }
  }
  COREAI_HD void look_up(const uint8_t* indices, uint16_t* out) const {
    const uint8x16_t index = vld1q_u8(indices);
    const uint8x16x2_t words = {{vqtbl2q_u8(low, index), vqtbl2q_u8(high, index)}};
    vst2q_u8(reinterpret_cast<uint8_t*>(out), words);
  }
  uint8x16x2_t low, high;
};

template <>
struct WordTable<TableKind::k16> : WordTable<TableKind::k32> {
  using WordTable<TableKind::k32>::WordTable;
};

#else

template <TableKind kKind>
struct FloatTable {
  static constexpr bool kIsQuick = false;
  explicit FloatTable(const float* table) : entries(table) {}
  COREAI_HD F at(I index) const {
    F result;
    for (int i = 0; i < kWidth; ++i) result.half[i / 4][i % 4] = entries[index.half[i / 4][i % 4]];
    return result;
  }
  const float* entries;
};

#endif

template <TableKind kKind>
struct Kinds {
  static constexpr TableKind value = kKind;
  static constexpr int64_t kRoom = kKind == TableKind::k256 ? 256 : 32;
};

template <class Body>
void with_table_kind(TableKind kind, Body body) {
  switch (kind) {
    case TableKind::k16:
      return body(Kinds<TableKind::k16>{});
    case TableKind::k32:
      return body(Kinds<TableKind::k32>{});
    case TableKind::k256:
      return body(Kinds<TableKind::k256>{});
  }
}

// body(position, length, block) for the stretches of indices from `begin` to `end` that share a block and, for
// vectors, a row.
template <class Body>
COREAI_HD void over_stretches(const PaletteLayout& layout, int64_t begin, int64_t end, Body body) {
  if (begin >= end) return;
  const Geometry& g = *layout.geometry;
  const int64_t length = row_length(g);
  int64_t row = begin / length, column = begin % length / g.run;
  int64_t run_end = row * length + (column + 1) * g.run, base = row_base(g, row);
  int64_t line_end = layout.dim == 1 ? end : (begin / layout.row + 1) * layout.row;
  while (begin < end) {
    const int64_t stop = min(min(run_end, line_end), end);
    body(begin, stop - begin, base + column);
    begin = stop;
    if (begin == line_end) line_end += layout.row;
    if (begin < run_end) continue;
    run_end += g.run;
    if (++column == g.columns) {
      column = 0;
      base = row_base(g, ++row);
    }
  }
}

template <class T>
COREAI_HD F load_lanes(const T* x, int lanes) {
  return lanes == kWidth ? Simd::load(x) : Simd::load_n(x, lanes);
}

// Where in the weight the first entry of the vector with that index is.
COREAI_HD int64_t entry_of(const PaletteLayout& layout, int64_t position) {
  return layout.dim == 1 ? position : position + position / layout.row * layout.row * (layout.dim - 1);
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
