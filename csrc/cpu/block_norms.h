// L1 norms of blocks, as the reference defines them: sums that do not depend on the order of the additions.
#pragma once

#include "common/exact_sum.h"
#include "cpu/loops.h"

namespace coreai::cpu::COREAI_LEVEL {
namespace {

constexpr int32_t kInfinityKey = 0x7f800000;
// Part of a block that is worth a thread's while.
constexpr int64_t kNormPart = 1 << 16;

// Half the lanes, as the compiler's own vectors: they convert to as many float64.
constexpr int kHalf = kWidth / 2;
typedef float FloatHalf __attribute__((vector_size(4 * kHalf)));
typedef double DoubleHalf __attribute__((vector_size(8 * kHalf)));
typedef uint64_t WordHalf __attribute__((vector_size(8 * kHalf)));

COREAI_HD I magnitude_bits(F x) { return Simd::iand(Simd::as_int(x), Simd::iset(0x7fffffff)); }

// Magnitudes in float64.
struct Wide {
  DoubleHalf half[2];

  explicit COREAI_HD Wide(F x) {
    const F magnitude = Simd::as_float(magnitude_bits(x));
#if defined(__AVX512DQ__)  // of the conversion below GCC makes twice as many instructions
    half[0] = (DoubleHalf)_mm512_cvtps_pd(_mm512_castps512_ps256(magnitude));
    half[1] = (DoubleHalf)_mm512_cvtps_pd(_mm512_extractf32x8_ps(magnitude, 1));
#else
    FloatHalf part[2];
    __builtin_memcpy(part, &magnitude, sizeof(part));
    half[0] = __builtin_convertvector(part[0], DoubleHalf);
    half[1] = __builtin_convertvector(part[1], DoubleHalf);
#endif
  }
};

// Sums in progress, one a lane.
struct Sums {
  DoubleHalf half[2];

  COREAI_HD void add(F x, DoubleHalf low_shift, DoubleHalf high_shift) {
    const Wide wide(x);
    half[0] += (wide.half[0] + low_shift) - low_shift;
    half[1] += (wide.half[1] + high_shift) - high_shift;
  }
};

// The same in units: a value plus 2^52 units has the bits of those and, in its low bits, the number of units.
struct UnitSums {
  WordHalf half[2];

  COREAI_HD void add(F x, DoubleHalf shift) {
    const Wide wide(x);
    half[0] += (WordHalf)(wide.half[0] + shift);
    half[1] += (WordHalf)(wide.half[1] + shift);
  }
};

// Bits of the largest magnitude; above infinity's if there is a NaN.
template <class T>
COREAI_HD int32_t peak_of(const T* x, int64_t n) {
  I a = Simd::iset(0), b = a;
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    a = Simd::imax(a, magnitude_bits(Simd::load(x + i)));
    b = Simd::imax(b, magnitude_bits(Simd::load(x + i + kWidth)));
  }
  a = Simd::imax(a, b);
  for (; i < n; i += kWidth) {
    a = Simd::imax(a, magnitude_bits(Simd::load_n(x + i, static_cast<int>(smaller<int64_t>(kWidth, n - i)))));
  }
  alignas(64) int32_t lanes[kWidth];
  Simd::store(lanes, a);
  int32_t peak = 0;
  for (int lane = 0; lane < kWidth; ++lane) peak = larger(peak, lanes[lane]);
  return peak;
}

template <class T>
COREAI_HD double sum_of(const T* x, int64_t n, double shift) {
  const DoubleHalf shifts = DoubleHalf{} + shift;
  UnitSums a = {}, b = {};
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    a.add(Simd::load(x + i), shifts);
    b.add(Simd::load(x + i + kWidth), shifts);
  }
  for (; i < n; i += kWidth) {
    a.add(Simd::load_n(x + i, static_cast<int>(smaller<int64_t>(kWidth, n - i))), shifts);
  }
  const WordHalf both = a.half[0] + a.half[1] + b.half[0] + b.half[1];
  uint64_t bits_of_shift, units = 0;
  __builtin_memcpy(&bits_of_shift, &shift, sizeof(shift));
  for (int lane = 0; lane < kHalf; ++lane) units += both[lane];
  units -= static_cast<uint64_t>(i) * bits_of_shift;  // lanes past the end are zeros
  return static_cast<double>(static_cast<int64_t>(units)) * (shift * 0x1p-52);
}

template <class = void>
COREAI_HD float float_of(int32_t bits) {
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

// Of a block with an infinity or a NaN nothing else counts.
template <class = void>
COREAI_HD double norm_or(int32_t peak, double sum) {
  return peak < kInfinityKey ? sum : peak == kInfinityKey ? __builtin_inf() : __builtin_nan("");
}

template <class T>
void norms_of_runs(const Geometry& g, const T* x, int bits_of_count, double* norms) {
  share(g.columns, 1, larger<int64_t>(1, kParallelElements / g.run), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* p = x + i * g.run;
      const int32_t peak = peak_of(p, g.run);
      const double shift = rounding_shift(float_of(smaller(peak, kInfinityKey - 1)), bits_of_count);
      norms[i] = norm_or(peak, sum_of(p, g.run, shift));
    }
  });
}

template <class T>
COREAI_HD void peaks_of_row(const Geometry& g, const T* x, int32_t* peaks) {
  if (g.run > 1) {
    for (int64_t i = 0; i < g.columns; ++i) peaks[i] = larger(peaks[i], peak_of(x + i * g.run, g.run));
    return;
  }
  int64_t i = 0;
  for (; i + kWidth <= g.columns; i += kWidth) {
    Simd::store(peaks + i, Simd::imax(Simd::load(peaks + i), magnitude_bits(Simd::load(x + i))));
  }
  for (; i < g.columns; ++i) peaks[i] = larger(peaks[i], peak_of(x + i, 1));
}

template <class T>
COREAI_HD void sums_of_row(const Geometry& g, const T* x, const double* shifts, double* sums) {
  if (g.run > 1) {
    for (int64_t i = 0; i < g.columns; ++i) sums[i] += sum_of(x + i * g.run, g.run, shifts[i]);
    return;
  }
  int64_t i = 0;
  for (; i + kWidth <= g.columns; i += kWidth) {
    Sums lanes;
    DoubleHalf shift[2];
    __builtin_memcpy(&lanes, sums + i, sizeof(lanes));
    __builtin_memcpy(shift, shifts + i, sizeof(shift));
    lanes.add(Simd::load(x + i), shift[0], shift[1]);
    __builtin_memcpy(sums + i, &lanes, sizeof(lanes));
  }
  for (; i < g.columns; ++i) sums[i] += sum_of(x + i, 1, shifts[i]);
}

// Work that is divided into parts, each with an array of its own for what it finds.
struct Parts {
  int64_t count, size, total;
  Parts(int64_t items, int64_t wanted) {
    count = larger<int64_t>(1, smaller(wanted, items));
    size = (items + count - 1) / count;
    total = items;
  }
  template <class Body>
  void each(Body body) const {
    share(count, 1, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = smaller(total, i * size);
        body(i, first, smaller(total, first + size));
      }
    });
  }
};

// Runs shorter than a vector, as columns of their own: their sums are added in the end.
template <class = void>
COREAI_HD Geometry without_short_runs(Geometry g, int64_t& joined) {
  joined = 1;
  if (g.run == 1 || g.run >= kWidth || g.outer_axes == 0) return g;
  joined = g.run;
  g.run = 1;
  g.columns *= joined;
  g.blocks *= joined;
  for (int axis = 0; axis < g.outer_axes; ++axis) g.outer[axis].stride *= joined;
  return g;
}

// For blocks that several parts share.
template <class T>
void norms_in_parts(const Geometry& geometry, const T* x, int bits_of_count, double* norms) {
  int64_t joined;
  const Geometry g = without_short_runs(geometry, joined);
  const bool single = g.outer_axes == 0;  // few long runs: cut them
  const int64_t length = single ? g.run : row_length(g);
  const int64_t items = single ? (g.run + kNormPart - 1) / kNormPart : g.numel / length;
  const Parts parts(items, g.numel < kParallelElements ? 1 : threads());
  const auto size = static_cast<uint64_t>(parts.count * g.blocks);
  int32_t* peaks = new int32_t[size]();
  double* sums = new double[size]();
  double* shifts = new double[static_cast<uint64_t>(g.blocks)];
  parts.each([&](int64_t part, int64_t begin, int64_t end) {
    int32_t* mine = peaks + part * g.blocks;
    if (single) {
      const int64_t first = begin * kNormPart, n = smaller(g.run, end * kNormPart) - first;
      for (int64_t i = 0; n > 0 && i < g.columns; ++i) mine[i] = peak_of(x + i * g.run + first, n);
      return;
    }
    for (; begin < end; ++begin) peaks_of_row(g, x + begin * length, mine + row_base(g, begin));
  });
  for (int64_t part = 1; part < parts.count; ++part) {
    for (int64_t i = 0; i < g.blocks; ++i) peaks[i] = larger(peaks[i], peaks[part * g.blocks + i]);
  }
  for (int64_t i = 0; i < g.blocks; i += joined) {
    for (int64_t j = i + 1; j < i + joined; ++j) peaks[i] = larger(peaks[i], peaks[j]);
    const double shift = rounding_shift(float_of(smaller(peaks[i], kInfinityKey - 1)), bits_of_count);
    for (int64_t j = i; j < i + joined; ++j) shifts[j] = shift;
  }
  parts.each([&](int64_t part, int64_t begin, int64_t end) {
    double* mine = sums + part * g.blocks;
    if (single) {
      const int64_t first = begin * kNormPart, n = smaller(g.run, end * kNormPart) - first;
      for (int64_t i = 0; n > 0 && i < g.columns; ++i) mine[i] = sum_of(x + i * g.run + first, n, shifts[i]);
      return;
    }
    for (; begin < end; ++begin) {
      const int64_t base = row_base(g, begin);
      sums_of_row(g, x + begin * length, shifts + base, mine + base);
    }
  });
  for (int64_t i = 0; i < geometry.blocks; ++i) {
    double sum = 0.0;
    for (int64_t part = 0; part < parts.count; ++part) {
      for (int64_t j = i * joined; j < (i + 1) * joined; ++j) sum += sums[part * g.blocks + j];
    }
    norms[i] = norm_or(peaks[i * joined], sum);
  }
  delete[] peaks;
  delete[] sums;
  delete[] shifts;
}

void block_norms(const Geometry& g, Element element, const void* x, double* norms) {
  const int bits_of_count = bits_to_count(g.numel / g.blocks);
  with_type(element, [&](auto type) {
    const auto* data = static_cast<const typename decltype(type)::type*>(x);
    const bool few_long_runs = g.columns < 4 * threads() && g.run > 4 * kNormPart && threads() > 1;
    if (g.outer_axes == 0 && !few_long_runs) {
      norms_of_runs(g, data, bits_of_count, norms);
    } else {
      norms_in_parts(g, data, bits_of_count, norms);
    }
  });
}

}  // namespace
}  // namespace coreai::cpu::COREAI_LEVEL
