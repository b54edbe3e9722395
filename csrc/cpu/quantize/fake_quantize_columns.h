// fake_quantize where each element of a row is a block of its own: columns of a matrix.
//
// Rows are walked as they lie in memory, one after the other, for that is what memory is quick at: a strip of them as
// wide as the parameters of its columns fit into a first-level cache, which saves looking them up for each row.
#pragma once

#include "cpu/quantize/block_params.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

// Two neighbouring vectors of results; of finite values they are numbers.
template <class K, class T>
COREAI_HD void store_results(T* y, F a, F b) {
  if constexpr (K::kDivision == Division::kReciprocalOfFinite) {
    Simd::store_pair_of_numbers(y, a, b);
  } else {
    Simd::store_pair(y, a, b);
  }
}

// Whether each element of a row is a block of its own, and rows are whole bytes of the mask.
inline bool is_by_columns(const Geometry& g) { return g.run == 1 && g.columns >= kWidth && g.columns % 8 == 0; }

// Rows that follow each other and have the same blocks.
COREAI_HD int64_t sharing_rows(const Geometry& g) {
  const Geometry::Outer* inner = g.outer_axes > 0 ? &g.outer[g.outer_axes - 1] : nullptr;
  return inner && inner->stride == 0 ? inner->size : 1;
}

constexpr int64_t kTileColumns = 1024, kTileRows = 64;

// Neighbouring columns of some rows.
template <class T>
struct Tile {
  const T* x;
  T* y;
  uint8_t* mask;  // null: not wanted
  int64_t stride, rows, columns;

  // What is right of and below an element.
  COREAI_HD Tile from(int64_t row, int64_t column) const {
    const int64_t offset = row * stride + column;
    return {x + offset, y + offset, mask ? mask + offset / 8 : nullptr, stride, rows - row, columns - column};
  }
  // Rows that hold so many elements.
  COREAI_HD int64_t rows_of(int64_t elements) const { return (elements + columns - 1) / columns; }
};

// Parameters of two vectors of columns.
struct ColumnPair {
  Params<Simd> left, right;
  Division division;

  template <class K>
  COREAI_HD void load(const Affine& a, int64_t block, K kind) {
    const auto p = ColumnParams::load(a, block, kWidth, kind), q = ColumnParams::load(a, block + kWidth, kWidth, kind);
    left = p.lanes, right = q.lanes;
    division = p.division == q.division ? p.division : Division::kDivide;
  }
};

// Two whole vectors. Parameters come by value: stores of bytes may alias what is in memory.
template <class Bits, class K, class T>
COREAI_HD void fake_quantize_columns(const T* x, T* y, typename Bits::Cursor mask, ColumnPair p, K kind) {
  M inside[2];
  const F a = quantize_lanes<Simd>(Simd::load(x), p.left, inside[0], kind);
  const F b = quantize_lanes<Simd>(Simd::load(x + kWidth), p.right, inside[1], kind);
  store_results<K>(y, dequantize_lanes<Simd, K>(a, p.left), dequantize_lanes<Simd, K>(b, p.right));
  put_masks<Bits>(mask, inside[0], inside[1]);
}

template <class Bits, class K>
COREAI_HD void fake_quantize_columns(const BFloat16* x, BFloat16* y, typename Bits::Cursor mask, PackedBf16Columns p,
                                     K kind) {
  fake_quantize_packed_bf16<Bits>(Words<2>::load(x), y, p.even, p.odd, p.bounds, mask, kind);
}

// Pairs of whole vectors, row by row; `params` has one entry a pair.
template <class Bits, class K, class T, class Pair>
COREAI_HD void fake_quantize_pairs_of_columns(const Tile<T>& tile, typename Bits::Cursor mask, const Pair* params, K kind) {
  const int64_t pairs = tile.columns / (2 * kWidth);
  const int64_t read = tile.rows_of(4096) * tile.stride, written = tile.rows_of(512) * tile.stride;
  for (int64_t row = 0; row < tile.rows; ++row) {
    const T* x = tile.x + row * tile.stride;
    T* y = tile.y + row * tile.stride;
    const auto bits = Bits::at(mask, row * (tile.stride / 8));
    for (int64_t i = 0; i < pairs; ++i, x += 2 * kWidth, y += 2 * kWidth) {
      fetch(x + read, y + written);
      fake_quantize_columns<Bits>(x, y, Bits::at(bits, i * (2 * kWidth / 8)), params[i], kind);
    }
  }
}

// The same with or without a mask.
template <class K, class T, class Pair>
COREAI_HD void fake_quantize_pairs_of_columns(const Tile<T>& tile, const Pair* params, K kind) {
  if (tile.mask) {
    fake_quantize_pairs_of_columns<BitWriter>(tile, tile.mask, params, kind);
  } else {
    fake_quantize_pairs_of_columns<NoBits>(tile, {}, params, kind);
  }
}

// Returns whether packed bfloat16 suits all the columns; if not, nothing is done.
template <class K>
bool fake_quantize_tile_of_packed_bf16(const Tile<BFloat16>& tile, const Affine& affine, int64_t block, K kind) {
  PackedBf16Columns params[kTileColumns / (2 * kWidth)];
  for (int64_t i = 0; i < tile.columns / (2 * kWidth); ++i) {
    if (!params[i].load(affine, block + 2 * kWidth * i, kind)) return false;
  }
  if (affine.finite) {
    fake_quantize_pairs_of_columns(tile, params, dividing_by<Division::kPackedBf16OfFinite>(kind));
  } else {
    fake_quantize_pairs_of_columns(tile, params, dividing_by<Division::kPackedBf16>(kind));
  }
  return true;
}

template <class K, class T>
void fake_quantize_tile_by_lanes(const Tile<T>& tile, const Affine& affine, int64_t block, K kind) {
  ColumnPair params[kTileColumns / (2 * kWidth)];
  Division division = Division::kDivide;
  for (int64_t i = 0; i < tile.columns / (2 * kWidth); ++i) {
    params[i].load(affine, block + 2 * kWidth * i, kind);
    division = i == 0 || params[i].division == division ? params[i].division : Division::kDivide;
  }
  with_division<float>(division, kind, [&](auto divided) __attribute__((always_inline)) {
    fake_quantize_pairs_of_columns(tile, params, divided);
  });
}

// Less than two vectors of columns, whole bytes of the mask. They are so few that a division does.
template <class K, class T>
void fake_quantize_last_columns(const Tile<T>& tile, const Affine& affine, int64_t block, K kind) {
  for (int64_t i = 0; i < tile.columns; i += kWidth) {
    const int n = static_cast<int>(min<int64_t>(kWidth, tile.columns - i));
    const auto p = params_of_columns(affine, block + i, 0, 1, n);
    for (int64_t row = 0; row < tile.rows; ++row) {
      const Tile<T> at = tile.from(row, i);
      M inside;
      const F q = quantize_lanes<Simd>(Simd::load_n(at.x, n), p, inside, kind);
      Simd::store_n(at.y, dequantize_lanes<Simd, K>(q, p), n);
      const uint32_t bits = Simd::bits(inside);
      for (int byte = 0; at.mask && byte < n / 8; ++byte) at.mask[byte] = static_cast<uint8_t>(bits >> (8 * byte));
    }
  }
}

// The first column's block is `block`.
template <class K, class T>
void fake_quantize_tile(const Tile<T>& tile, const Affine& affine, int64_t block, K kind) {
  bool done = false;
  if constexpr (kHasPackedBf16<K, T>) done = fake_quantize_tile_of_packed_bf16(tile, affine, block, kind);
  if (!done) fake_quantize_tile_by_lanes(tile, affine, block, kind);
  const int64_t whole = tile.columns - tile.columns % (2 * kWidth);
  if (whole < tile.columns) fake_quantize_last_columns(tile.from(0, whole), affine, block + whole, kind);
}

template <class T, class K>
void fake_quantize_rows_of_columns(const FakeQuantize& job, int64_t begin, int64_t end, K kind) {
  const Geometry& g = *job.geometry;
  const int64_t sharing = sharing_rows(g);
  const T* x = static_cast<const T*>(job.input);
  T* y = static_cast<T*>(job.output);
  const Tile<T> all = {x, y, job.mask, g.columns, end, g.columns};
  while (begin < end) {
    const int64_t base = row_base(g, begin);
    const int64_t rows = min(min(kTileRows, end - begin), sharing - begin % sharing);
    for (int64_t column = 0; column < g.columns; column += kTileColumns) {
      Tile<T> tile = all.from(begin, column);
      tile.rows = rows, tile.columns = min(kTileColumns, tile.columns);
      fake_quantize_tile(tile, job.affine, base + column, kind);
    }
    begin += rows;
  }
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
