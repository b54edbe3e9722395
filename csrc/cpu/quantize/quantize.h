// quantize and dequantize: values of a storage type on one side, of a floating-point type on the other.
#pragma once

#include "common/fp8.h"
#include "cpu/quantize/fake_quantize.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

// Elements converted at a time, by way of float32 in a buffer on the stack: a multiple of kWidth.
constexpr int64_t kChunk = 256;

// Whole numbers, of which the low byte is kept. NaN has none and becomes 0.
template <class = void>
COREAI_HD I to_byte(F x) {
  return Simd::truncate(Simd::select(Simd::unordered(x, x), Simd::set(0.0f), x));
}

// Codes of n values, encode(vector) or decode(codes) at a time. The buffer of values has room for whole vectors.
template <class Encode>
COREAI_HD void store_codes(uint8_t* out, const float* values, int64_t n, Encode encode) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) Simd::store_bytes(out + i, encode(Simd::load(values + i)));
  if (i == n) return;
  uint8_t tail[kWidth];
  Simd::store_bytes(tail, encode(Simd::load(values + i)));
  for (int64_t j = 0; i + j < n; ++j) out[i + j] = tail[j];
}

template <class Decode>
COREAI_HD void load_codes(float* values, const uint8_t* in, int64_t n, Decode decode) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) Simd::store(values + i, decode(Simd::load_bytes(in + i)));
  if (i == n) return;
  uint8_t tail[kWidth] = {};
  for (int64_t j = 0; i + j < n; ++j) tail[j] = in[i + j];
  Simd::store(values + i, decode(Simd::load_bytes(tail)));
}

template <class T>
COREAI_HD void store_floats(T* out, const float* values, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) Simd::store(out + i, Simd::load(values + i));
  if (i < n) Simd::store_n(out + i, Simd::load(values + i), static_cast<int>(n - i));
}

template <class T>
COREAI_HD void load_floats(float* values, const T* in, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) Simd::store(values + i, Simd::load(in + i));
  if (i < n) Simd::store(values + i, Simd::load_n(in + i, static_cast<int>(n - i)));
}

inline void store_as(Storage storage, void* out, int64_t at, const float* values, int64_t n) {
  uint8_t* bytes = static_cast<uint8_t*>(out) + at;
  switch (storage) {
    case Storage::kInt8:
    case Storage::kUInt8:
      return store_codes(bytes, values, n, to_byte<>);
    case Storage::kE4M3:
      return store_codes(bytes, values, n, encode_fp8<Simd, Format::kE4M3>);
    case Storage::kE5M2:
      return store_codes(bytes, values, n, encode_fp8<Simd, Format::kE5M2>);
    case Storage::kFloat32:
      return store_floats(static_cast<float*>(out) + at, values, n);
    case Storage::kBFloat16:
      return store_floats(static_cast<BFloat16*>(out) + at, values, n);
    case Storage::kFloat16:
      return store_floats(static_cast<Float16*>(out) + at, values, n);
    case Storage::kFloat64:
      return store_floats(static_cast<double*>(out) + at, values, n);
  }
}

inline void load_from(Storage storage, const void* in, int64_t at, float* values, int64_t n) {
  const uint8_t* bytes = static_cast<const uint8_t*>(in) + at;
  const I top = Simd::iset(0x80), extend = Simd::iset(-0x80);
  switch (storage) {
    case Storage::kInt8:
      return load_codes(values, bytes, n, [=](I code) {
        return Simd::to_float(Simd::iadd(Simd::iand(Simd::iadd(code, top), Simd::iset(0xff)), extend));
      });
    case Storage::kUInt8:
      return load_codes(values, bytes, n, [](I code) { return Simd::to_float(code); });
    case Storage::kE4M3:
      return load_codes(values, bytes, n, decode_fp8<Simd, Format::kE4M3>);
    case Storage::kE5M2:
      return load_codes(values, bytes, n, decode_fp8<Simd, Format::kE5M2>);
    case Storage::kFloat32:
      return load_floats(values, static_cast<const float*>(in) + at, n);
    case Storage::kBFloat16:
      return load_floats(values, static_cast<const BFloat16*>(in) + at, n);
    case Storage::kFloat16:
      return load_floats(values, static_cast<const Float16*>(in) + at, n);
    case Storage::kFloat64:
      return load_floats(values, static_cast<const double*>(in) + at, n);
  }
}

inline Storage storage_of(Element element) {
  switch (element) {
    case Element::kBFloat16:
      return Storage::kBFloat16;
    case Element::kFloat16:
      return Storage::kFloat16;
    case Element::kFloat64:
      return Storage::kFloat64;
    default:
      return Storage::kFloat32;
  }
}

// convert(values, n, column, base): n values of a row, in place, with the parameters from column and base on.
template <class Values>
void convert_elements(const Convert& job, Storage from, Storage to, Values convert) {
  const Geometry& g = *job.geometry;
  const int64_t length = row_length(g);
  parallel_for(g.numel, kAlignment, kParallelElements, [&](int64_t begin, int64_t end) {
    alignas(64) float values[kChunk] = {};
    for (int64_t row = begin / length, column = begin % length; begin < end; ++row, column = 0) {
      const int64_t stop = min(end, begin + length - column);
      const int64_t base = row_base(g, row);
      while (begin < stop) {
        const int64_t n = min(kChunk, stop - begin);
        load_from(from, job.input, begin, values, n);
        convert(values, n, column, base);
        store_as(to, job.output, begin, values, n);
        begin += n, column += n;
      }
    }
  });
}

// lanes(x, parameters) for values of a row, in place. The buffer has room for whole vectors.
template <class Lanes>
COREAI_HD void convert_row(const Convert& job, float* values, int64_t n, int64_t column, int64_t base, Lanes lanes) {
  const int64_t run = job.geometry->run;
  if (run < kWidth) {
    for (int64_t i = 0; i < n; i += kWidth) {
      const int some = static_cast<int>(min<int64_t>(kWidth, n - i));
      const auto p = params_of_columns(job.affine, base, column + i, run, some);
      Simd::store(values + i, lanes(Simd::load(values + i), p));
    }
    return;
  }
  while (n > 0) {
    const int64_t piece = min(n, run - column % run);
    const auto p = params_of_block(job.affine, base + column / run);
    int64_t i = 0;
    for (; i + kWidth <= piece; i += kWidth) Simd::store(values + i, lanes(Simd::load(values + i), p));
    // The next block's values follow: these must stay as they are.
    const int rest = static_cast<int>(piece - i);
    if (rest > 0) Simd::store_n(values + i, lanes(Simd::load_n(values + i, rest), p), rest);
    values += piece, column += piece, n -= piece;
  }
}

// Zero points of the lanes: what the range was moved by.
template <class = void>
COREAI_HD F zero_points(const Affine& a, const Params<Simd>& p) {
  return Simd::sub(Simd::set(a.low), p.low);
}

void quantize(const Convert& job) {
  const F low = Simd::set(job.affine.low), high = Simd::set(job.affine.high);
  with_kind(job.affine.format, job.affine.offset != nullptr, [&](auto kind) {
    using K = decltype(kind);
    convert_elements(job, storage_of(job.element), job.storage, [&](float* values, int64_t n, int64_t column, int64_t base) {
      convert_row(job, values, n, column, base, [&](F x, const Params<Simd>& p) {
        const F q = quotient_lanes<Simd, K>(x, p);
        if constexpr (K::kIsInt) {
          return clamp_lanes<Simd>(Simd::add(q, zero_points(job.affine, p)), low, high);
        } else {
          return kind.template round<Simd>(clamp_lanes<Simd>(q, low, high));
        }
      });
    });
  });
}

void dequantize(const Convert& job) {
  with_kind(job.affine.format, job.affine.offset != nullptr, [&](auto kind) {
    using K = decltype(kind);
    convert_elements(job, job.storage, storage_of(job.element), [&](float* values, int64_t n, int64_t column, int64_t base) {
      convert_row(job, values, n, column, base, [&](F q, const Params<Simd>& p) {
        const F moved = K::kIsInt ? Simd::sub(q, zero_points(job.affine, p)) : q;
        return dequantize_lanes<Simd, K>(moved, p);
      });
    });
  });
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
