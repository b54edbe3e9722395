// fake_quantize.
#pragma once

#include "cpu/block_params.h"

namespace coreai::cpu::COREAI_LEVEL {
namespace {

template <class Bits, class K, class T>
COREAI_HD void fake_quantize_lanes(const T* x, T* y, const Params<Simd>& p,
                                   typename Bits::Cursor& cursor) {
  M inside;
  const F q = quantize_lanes<Simd, K>(Simd::load(x), p, inside);
  Simd::store(y, dequantize_lanes<Simd, K>(q, p));
  Bits::put_lanes(cursor, Simd::bits(inside));
}

// Two neighbouring vectors of results; of finite values they are numbers.
template <class K, class T>
COREAI_HD void store_results(T* y, F a, F b) {
  if constexpr (K::kWay == Way::kReciprocalOfFinite) {
    Simd::store_pair_of_numbers(y, a, b);
  } else {
    Simd::store_pair(y, a, b);
  }
}

template <class Bits, class K, class T>
COREAI_HD void fake_quantize_pair(const T* x, T* y, const Params<Simd>& p,
                                  typename Bits::Cursor& cursor) {
  M inside[2];
  const F a = quantize_lanes<Simd, K>(Simd::load(x), p, inside[0]);
  const F b = quantize_lanes<Simd, K>(Simd::load(x + kWidth), p, inside[1]);
  store_results<K>(y, dequantize_lanes<Simd, K>(a, p), dequantize_lanes<Simd, K>(b, p));
  Bits::put_lanes(cursor, Simd::bits(inside[0]));
  Bits::put_lanes(cursor, Simd::bits(inside[1]));
}

template <class K, class T, class Bits>
COREAI_HD void fake_quantize_some(const T* x, T* y, int n, const Params<Simd>& p,
                                  Bits& bits) {
  M inside;
  const F q = quantize_lanes<Simd, K>(Simd::load_n(x, n), p, inside);
  Simd::store_n(y, dequantize_lanes<Simd, K>(q, p), n);
  bits.push(Simd::bits(inside) & ((1u << n) - 1u), n);
}

// Elements that share their parameters.
template <class K, class T, class Bits>
COREAI_HD void fake_quantize_run(const T* x, T* y, int64_t n, const Params<Simd>& p,
                                 Bits& bits) {
  int64_t i = 0;
  if (bits.aligned()) {
    auto cursor = bits.cursor();
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
      fetch_ahead(x + i, y + i);
      fake_quantize_pair<Bits, K>(x + i, y + i, p, cursor);
    }
    if (i + kWidth <= n) {
      fake_quantize_lanes<Bits, K>(x + i, y + i, p, cursor);
      i += kWidth;
    }
    bits.resume(cursor);
  }
  for (; i < n; i += kWidth) {
    fake_quantize_some<K>(x + i, y + i, static_cast<int>(smaller<int64_t>(kWidth, n - i)), p, bits);
  }
}

// The same of bfloat16 by words. Returns how many of the elements it has done.
template <class K, bool kUntied, class Bits>
COREAI_HD int64_t fake_quantize_run_of_words(const BFloat16* x, BFloat16* y, int64_t n, const WordParams& p,
                                             Bits& bits) {
  if (!bits.aligned()) return 0;
  int64_t i = 0;
  auto cursor = bits.cursor();
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    fetch_ahead(x + i, y + i);
    fake_quantize_words<Bits, K, kUntied>(Words<2>::load(x + i), y + i, p, p, cursor);
  }
  bits.resume(cursor);
  return i;
}

// Blocks of two whole vectors each.
template <class K, class T, class Bits>
COREAI_HD void fake_quantize_pairs(const T* x, T* y, int blocks, const BlockParams& params, Bits& bits) {
  auto cursor = bits.cursor();
  for (int i = 0; i < blocks; ++i, x += 2 * kWidth, y += 2 * kWidth) {
    fetch_ahead(x, y);
    if constexpr (K::kByWords) {
      const WordParams p = params.words(i);
      fake_quantize_words<Bits, K>(Words<2>::load(x), y, p, p, cursor);
    } else {
      fake_quantize_pair<Bits, K>(x, y, params[i], cursor);
    }
  }
  bits.resume(cursor);
}

template <class K, class T, class Bits>
COREAI_HD void fake_quantize_blocks_as(const T* x, T* y, int64_t run, int blocks, const BlockParams& params,
                                       Bits& bits) {
  if (run == 2 * kWidth && bits.aligned()) return fake_quantize_pairs<K>(x, y, blocks, params, bits);
  for (int i = 0; i < blocks; ++i, x += run, y += run) {
    if constexpr (K::kByWords) {
      const bool untied = K::kWay == Way::kWordsOfFinite && is_untied(params.scale[i]);
      const int64_t done = untied ? fake_quantize_run_of_words<K, true>(x, y, run, params.words(i), bits)
                                  : fake_quantize_run_of_words<K, false>(x, y, run, params.words(i), bits);
      if (done < run) {
        using Rest = typename K::template By<Way::kDivide>;
        fake_quantize_run<Rest>(x + done, y + done, run - done, params[i], bits);
      }
    } else {
      fake_quantize_run<K>(x, y, run, params[i], bits);
    }
  }
}

// Neighbouring blocks of `run` elements each.
template <class K, class T, class Bits>
COREAI_HD void fake_quantize_blocks(const T* x, T* y, int64_t run, int blocks, const BlockParams& params, Bits& bits) {
  with_way<K, T>(params.way, [&](auto kind) __attribute__((always_inline)) {
    fake_quantize_blocks_as<decltype(kind)>(x, y, run, blocks, params, bits);
  });
}

// Elements [column, column + n) of a row whose first block is `base`.
template <class K, class T, class Bits>
COREAI_HD void fake_quantize_row(const T* x, T* y, int64_t column, int64_t n, int64_t base, int64_t run,
                                 const Affine& a, Bits& bits) {
  if (run >= kWidth) {
    BlockParams params;
    while (n > 0) {
      const int64_t block = base + column / run, inside = column % run;
      const int64_t whole = inside == 0 ? n / run : 0;
      const int blocks = static_cast<int>(larger<int64_t>(1, smaller<int64_t>(kWidth, whole)));
      const int64_t piece = whole > 0 ? blocks * run : smaller(n, run - inside);
      params.load<K, T>(a, block, blocks, a.finite);
      fake_quantize_blocks<K>(x, y, whole > 0 ? run : piece, blocks, params, bits);
      x += piece, y += piece, column += piece, n -= piece;
    }
    return;
  }
  for (int64_t i = 0; i < n; i += kWidth) {
    const int some = static_cast<int>(smaller<int64_t>(kWidth, n - i));
    const auto p = params_of_columns(a, base, column + i, run, some);
    if (some == kWidth && bits.aligned()) {
      auto cursor = bits.cursor();
      fake_quantize_lanes<Bits, K>(x + i, y + i, p, cursor);
      bits.resume(cursor);
    } else {
      fake_quantize_some<K>(x + i, y + i, some, p, bits);
    }
  }
}

// Rows of blocks of one element: a look at the parameters serves so many rows. Those of words take longer.
template <class K, class T>
constexpr int kBand = kHasWords<K, T> ? 16 : 4;

// The same columns of some rows, `stride` elements apart: two whole vectors of them.
template <class K, class T>
COREAI_HD void fake_quantize_column_pair(const T* x, T* y, uint8_t* mask, int64_t stride, int rows,
                                         const Params<Simd>& left, const Params<Simd>& right) {
  for (int row = 0; row < rows; ++row, x += stride, y += stride) {
    M inside[2];
    const F a = quantize_lanes<Simd, K>(Simd::load(x), left, inside[0]);
    const F b = quantize_lanes<Simd, K>(Simd::load(x + kWidth), right, inside[1]);
    store_results<K>(y, dequantize_lanes<Simd, K>(a, left), dequantize_lanes<Simd, K>(b, right));
    if (mask) {
      BitWriter::Cursor cursor = mask + row * (stride / 8);
      BitWriter::put_lanes(cursor, Simd::bits(inside[0]));
      BitWriter::put_lanes(cursor, Simd::bits(inside[1]));
    }
  }
}

// The same by words.
template <class Bits, class K>
COREAI_HD void fake_quantize_column_words(const BFloat16* x, BFloat16* y, typename Bits::Cursor mask, int64_t stride,
                                          int rows, const ColumnWords& p) {
  // All are read before one is written: a load waits for stores at the same place of another page.
  typename Words<2>::V words[kBand<K, BFloat16>];
  for (int row = 0; row < rows; ++row) words[row] = Words<2>::load(x + row * stride);
  for (int row = 0; row < rows; ++row, y += stride) {
    auto cursor = Bits::at(mask, row * (stride / 8));
    fake_quantize_words<Bits, K>(words[row], y, p.even, p.odd, cursor);
  }
}

// Up to one vector of them, whole bytes of the mask.
template <class K, class T>
COREAI_HD void fake_quantize_some_columns(const T* x, T* y, uint8_t* mask, int64_t stride, int rows, int n,
                                          const Params<Simd>& p) {
  for (int row = 0; row < rows; ++row, x += stride, y += stride) {
    M inside;
    const F q = quantize_lanes<Simd, K>(Simd::load_n(x, n), p, inside);
    Simd::store_n(y, dequantize_lanes<Simd, K>(q, p), n);
    const uint32_t bits = Simd::bits(inside);
    for (int byte = 0; mask && byte < n / 8; ++byte) {
      mask[row * (stride / 8) + byte] = static_cast<uint8_t>(bits >> (8 * byte));
    }
  }
}

// Whether each element of a row is a block of its own, and rows are whole bytes of the mask.
inline bool is_by_columns(const Geometry& g) { return g.run == 1 && g.columns >= kWidth && g.columns % 8 == 0; }

template <class K, class T>
void fake_quantize_rows_of_columns(const FakeQuantize& job, int64_t begin, int64_t end) {
  const Geometry& g = *job.geometry;
  const int64_t length = g.columns;
  const int64_t sharing = g.outer_axes > 0 && g.outer[g.outer_axes - 1].stride == 0 ? g.outer[g.outer_axes - 1].size : 1;
  const T* x = static_cast<const T*>(job.input);
  T* y = static_cast<T*>(job.output);
  // Rows of whole pages compete for one set of the cache.
  const int64_t band = length * sizeof(T) % 4096 == 0 ? kBand<K, T> / 2 : kBand<K, T>;
  while (begin < end) {
    const int64_t base = row_base(g, begin);
    const int rows = static_cast<int>(smaller(smaller(band, end - begin), sharing - begin % sharing));
    const int64_t first = begin * length;
    const auto mask_at = [&](int64_t i) { return job.mask ? job.mask + (first + i) / 8 : nullptr; };
    int64_t i = 0;
    for (; i + 2 * kWidth <= length; i += 2 * kWidth) {
      if constexpr (kHasWords<K, T>) {
        const auto words = ColumnWords::load<K>(job.affine, base + i);
        if (words.suit) {
          const Way way = job.affine.finite ? Way::kWordsOfFinite : Way::kWords;
          with_way<K, T>(way, [&](auto kind) __attribute__((always_inline)) {
            using ByWords = decltype(kind);
            if (job.mask) {
              fake_quantize_column_words<BitWriter, ByWords>(x + first + i, y + first + i, mask_at(i), length, rows, words);
            } else {
              fake_quantize_column_words<NoBits, ByWords>(x + first + i, y + first + i, {}, length, rows, words);
            }
          });
          continue;
        }
      }
      const auto left = ColumnParams::load<K>(job.affine, base + i, kWidth);
      const auto right = ColumnParams::load<K>(job.affine, base + i + kWidth, kWidth);
      with_way<K, float>(left.way == right.way ? left.way : Way::kDivide, [&](auto kind) __attribute__((always_inline)) {
        fake_quantize_column_pair<decltype(kind)>(x + first + i, y + first + i, mask_at(i), length, rows, left.lanes,
                                                  right.lanes);
      });
    }
    for (; i < length; i += kWidth) {
      const int n = static_cast<int>(smaller<int64_t>(kWidth, length - i));
      const auto p = ColumnParams::load<K>(job.affine, base + i, n);
      with_way<K, float>(p.way, [&](auto kind) __attribute__((always_inline)) {
        fake_quantize_some_columns<decltype(kind)>(x + first + i, y + first + i, mask_at(i), length, rows, n, p.lanes);
      });
    }
    begin += rows;
  }
}

// Elements [begin, end) in memory order; begin is a multiple of eight.
template <class K, class T, class Bits>
void fake_quantize_elements(const FakeQuantize& job, int64_t begin, int64_t end, Bits bits) {
  const Geometry& g = *job.geometry;
  const T* x = static_cast<const T*>(job.input);
  T* y = static_cast<T*>(job.output);
  const int64_t length = row_length(g);
  for (int64_t row = begin / length, column = begin % length; begin < end; ++row, column = 0) {
    const int64_t n = smaller(end - begin, length - column);
    fake_quantize_row<K>(x + begin, y + begin, column, n, row_base(g, row), g.run, job.affine, bits);
    begin += n;
  }
  bits.flush();
}

template <class K, class T>
void fake_quantize_range(const FakeQuantize& job, int64_t begin, int64_t end) {
  if (job.mask) {
    fake_quantize_elements<K, T>(job, begin, end, BitWriter(job.mask + begin / 8));
  } else {
    fake_quantize_elements<K, T>(job, begin, end, NoBits());
  }
}

void fake_quantize(const FakeQuantize& job) {
  with_type(job.element, [&](auto type) {
    using T = typename decltype(type)::type;
    with_kind(job.affine.format, job.affine.offset != nullptr, [&](auto kind) {
      using K = decltype(kind);
      const Geometry& g = *job.geometry;
      if (is_by_columns(g)) {
        share(g.numel / g.columns, 1, larger<int64_t>(1, kParallelElements / g.columns),
              [&](int64_t begin, int64_t end) { fake_quantize_rows_of_columns<K, T>(job, begin, end); });
        return;
      }
      share(job.geometry->numel, kAlignment, kParallelElements,
            [&](int64_t begin, int64_t end) { fake_quantize_range<K, T>(job, begin, end); });
    });
  });
}

}  // namespace
}  // namespace coreai::cpu::COREAI_LEVEL
