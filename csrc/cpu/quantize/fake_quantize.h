// fake_quantize.
#pragma once

#include "cpu/quantize/fake_quantize_columns.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

template <class Bits, class K, class T>
COREAI_HD void fake_quantize_lanes(const T* x, T* y, const Params<Simd>& p, typename Bits::Cursor& cursor, K kind) {
  M inside;
  const F q = quantize_lanes<Simd>(Simd::load(x), p, inside, kind);
  Simd::store(y, dequantize_lanes<Simd, K>(q, p));
  Bits::put_lanes(cursor, Simd::bits(inside));
}

template <class Bits, class K, class T>
COREAI_HD void fake_quantize_pair(const T* x, T* y, const Params<Simd>& p, typename Bits::Cursor& cursor, K kind) {
  M inside[2];
  const F a = quantize_lanes<Simd>(Simd::load(x), p, inside[0], kind);
  const F b = quantize_lanes<Simd>(Simd::load(x + kWidth), p, inside[1], kind);
  store_results<K>(y, dequantize_lanes<Simd, K>(a, p), dequantize_lanes<Simd, K>(b, p));
  put_masks<Bits>(cursor, inside[0], inside[1]);
}

template <class K, class T, class Bits>
COREAI_HD void fake_quantize_some(const T* x, T* y, int n, const Params<Simd>& p, Bits& bits, K kind) {
  M inside;
  const F q = quantize_lanes<Simd>(Simd::load_n(x, n), p, inside, kind);
  Simd::store_n(y, dequantize_lanes<Simd, K>(q, p), n);
  bits.push(Simd::bits(inside) & ((1u << n) - 1u), n);
}

// What does not fill a vector, or begins within a byte of the mask.
template <class K, class T, class Bits>
COREAI_HD void fake_quantize_rest(const T* x, T* y, int64_t n, const Params<Simd>& p, Bits& bits, K kind) {
  for (int64_t i = 0; i < n; i += kWidth) {
    fake_quantize_some(x + i, y + i, static_cast<int>(min<int64_t>(kWidth, n - i)), p, bits, kind);
  }
}

// The same as a call. Parameters come by value, so that callers keep theirs in registers.
template <class K, class T, class Bits>
__attribute__((noinline)) void call_fake_quantize_rest(const T* x, T* y, int64_t n, Params<Simd> p, Bits& bits, K kind) {
  fake_quantize_rest(x, y, n, p, bits, kind);
}

// Elements that share their parameters.
template <class K, class T, class Bits>
COREAI_HD void fake_quantize_run(const T* x, T* y, int64_t n, const Params<Simd>& p, Bits& bits, K kind) {
  int64_t i = 0;
  if (bits.aligned()) {
    auto cursor = bits.cursor();
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
      fetch_ahead(x + i, y + i);
      fake_quantize_pair<Bits>(x + i, y + i, p, cursor, kind);
    }
    if (i + kWidth <= n) {
      fake_quantize_lanes<Bits>(x + i, y + i, p, cursor, kind);
      i += kWidth;
    }
    bits.resume(cursor);
  }
  if constexpr (Simd::kHasQuotient) {
    // However quotients are computed, results are the same: one copy for all ways.
    if (i < n) call_fake_quantize_rest(x + i, y + i, n - i, p, bits, dividing_by<Division::kDivide>(kind));
  } else {
    fake_quantize_rest(x + i, y + i, n - i, p, bits, kind);
  }
}

// The same of packed bfloat16. Returns how many of the elements it has done.
template <bool kNoTies, class K, class Bits>
COREAI_HD int64_t fake_quantize_run_of_packed_bf16(const BFloat16* x, BFloat16* y, int64_t n, const PackedBf16Params& p,
                                                   Bits& bits, K kind) {
  if (!bits.aligned()) return 0;
  int64_t i = 0;
  auto cursor = bits.cursor();
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    fetch_ahead(x + i, y + i);
    fake_quantize_packed_bf16<Bits, kNoTies>(Words<2>::load(x + i), y + i, p, p, p, cursor, kind);
  }
  bits.resume(cursor);
  return i;
}

// Blocks of two whole vectors each.
template <class K, class T, class Bits>
COREAI_HD void fake_quantize_pairs(const T* x, T* y, int blocks, const BlockParams& params, Bits& bits, K kind) {
  auto cursor = bits.cursor();
  for (int i = 0; i < blocks; ++i, x += 2 * kWidth, y += 2 * kWidth) {
    fetch_ahead(x, y);
    if constexpr (K::kIsPackedBf16) {
      const PackedBf16Params p = params.packed_bf16(i);
      fake_quantize_packed_bf16<Bits>(Words<2>::load(x), y, p, p, p, cursor, kind);
    } else {
      fake_quantize_pair<Bits>(x, y, params[i], cursor, kind);
    }
  }
  bits.resume(cursor);
}

template <class K, class T, class Bits>
COREAI_HD void fake_quantize_blocks_as(const T* x, T* y, int64_t run, int blocks, const BlockParams& params, Bits& bits,
                                       K kind) {
  if (run == 2 * kWidth && bits.aligned()) return fake_quantize_pairs(x, y, blocks, params, bits, kind);
  for (int i = 0; i < blocks; ++i, x += run, y += run) {
    if constexpr (K::kIsPackedBf16) {
      const bool no_ties = K::kDivision == Division::kPackedBf16OfFinite && has_no_ties(params.scale[i]);
      const int64_t done = no_ties ? fake_quantize_run_of_packed_bf16<true>(x, y, run, params.packed_bf16(i), bits, kind)
                                   : fake_quantize_run_of_packed_bf16<false>(x, y, run, params.packed_bf16(i), bits, kind);
      if (done < run) {
        fake_quantize_run(x + done, y + done, run - done, params[i], bits, dividing_by<Division::kDivide>(kind));
      }
    } else {
      fake_quantize_run(x, y, run, params[i], bits, kind);
    }
  }
}

// Neighbouring blocks of `run` elements each. One copy for all callers: a call takes little for so many elements, and
// each copy takes seconds to compile.
template <class K, class T, class Bits>
__attribute__((noinline)) void fake_quantize_blocks(const T* x, T* y, int64_t run, int blocks, const BlockParams& params,
                                                    Bits& bits, K kind) {
  with_division<T>(params.division, kind, [&](auto divided) __attribute__((always_inline)) {
    fake_quantize_blocks_as(x, y, run, blocks, params, bits, divided);
  });
}

// Elements [column, column + n) of a row whose first block is `base`.
template <class K, class T, class Bits>
COREAI_HD void fake_quantize_row(const T* x, T* y, int64_t column, int64_t n, int64_t base, int64_t run, const Affine& a,
                                 Bits& bits, K kind) {
  if (run >= kWidth) {
    BlockParams params;
    while (n > 0) {
      const int64_t block = base + column / run, inside = column % run;
      const int64_t whole = inside == 0 ? n / run : 0;
      const int blocks = static_cast<int>(max<int64_t>(1, min<int64_t>(kWidth, whole)));
      const int64_t piece = whole > 0 ? blocks * run : min(n, run - inside);
      params.load<T>(a, block, blocks, a.finite, kind);
      fake_quantize_blocks(x, y, whole > 0 ? run : piece, blocks, params, bits, kind);
      x += piece, y += piece, column += piece, n -= piece;
    }
    return;
  }
  for (int64_t i = 0; i < n; i += kWidth) {
    const int some = static_cast<int>(min<int64_t>(kWidth, n - i));
    const auto p = params_of_columns(a, base, column + i, run, some);
    if (some == kWidth && bits.aligned()) {
      auto cursor = bits.cursor();
      fake_quantize_lanes<Bits>(x + i, y + i, p, cursor, kind);
      bits.resume(cursor);
    } else {
      call_fake_quantize_rest(x + i, y + i, some, p, bits, kind);
    }
  }
}

// Elements [begin, end) in memory order; begin is a multiple of eight.
template <class T, class K, class Bits>
void fake_quantize_elements(const FakeQuantize& job, int64_t begin, int64_t end, Bits bits, K kind) {
  const Geometry& g = *job.geometry;
  const T* x = static_cast<const T*>(job.input);
  T* y = static_cast<T*>(job.output);
  const int64_t length = row_length(g);
  for (int64_t row = begin / length, column = begin % length; begin < end; ++row, column = 0) {
    const int64_t n = min(end - begin, length - column);
    fake_quantize_row(x + begin, y + begin, column, n, row_base(g, row), g.run, job.affine, bits, kind);
    begin += n;
  }
  bits.flush();
}

template <class T, class K>
void fake_quantize_range(const FakeQuantize& job, int64_t begin, int64_t end, K kind) {
  if (job.mask) {
    fake_quantize_elements<T>(job, begin, end, BitWriter(job.mask + begin / 8), kind);
  } else {
    fake_quantize_elements<T>(job, begin, end, NoBits(), kind);
  }
}

// What of the elements read last is still in a second-level cache when they are read again, though as much
// is written meanwhile.
constexpr int64_t kRecentBytes = 1 << 20;

// Calls body(begin, end) over [begin, end), starting with elements that were read last. Seams are multiples of `unit`.
template <class Body>
COREAI_HD void recent_first(int64_t begin, int64_t end, int64_t recent, int64_t unit, Body body) {
  const int64_t seam = begin + max<int64_t>(0, end - begin - recent) / unit * unit;
  body(seam, end);
  if (begin < seam) body(begin, seam);
}

// `recent`: so many elements of each thread's share are quantized first.
template <class T, class K>
void fake_quantize_as(const FakeQuantize& job, int64_t recent, K kind) {
  const Geometry& g = *job.geometry;
  if (is_by_columns(g)) {
    parallel_for(g.numel / g.columns, 1, max<int64_t>(1, kParallelElements / g.columns), [&](int64_t begin, int64_t end) {
      recent_first(begin, end, recent / g.columns, 1,
                   [&](int64_t from, int64_t to) { fake_quantize_rows_of_columns<T>(job, from, to, kind); });
    });
    return;
  }
  parallel_for(g.numel, kAlignment, kParallelElements, [&](int64_t begin, int64_t end) {
    recent_first(begin, end, recent, kAlignment,
                 [&](int64_t from, int64_t to) { fake_quantize_range<T>(job, from, to, kind); });
  });
}

void fake_quantize(const FakeQuantize& job, int64_t recent_bytes) {
  with_type(job.element, [&](auto type) {
    using T = typename decltype(type)::type;
    with_kind(job.affine.format, job.affine.offset != nullptr,
              [&](auto kind) { fake_quantize_as<T>(job, recent_bytes / static_cast<int64_t>(sizeof(T)), kind); });
  });
}

// In order: nobody knows what of the input is in the cache.
void fake_quantize(const FakeQuantize& job) {
  fake_quantize(job, job.geometry->numel * static_cast<int64_t>(sizeof(float)));
}

// Of elements that have just been read in order.
void fake_quantize_observed(const FakeQuantize& job) { fake_quantize(job, kRecentBytes); }

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
