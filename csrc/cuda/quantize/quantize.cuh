// quantize and dequantize on a GPU: values of a storage type on one side, of a floating-point type on the other.
//
// A thread has eight elements that follow each other in memory, and divides: this is no part of a training step.
#pragma once

#include "common/fp8.h"
#include "cuda/quantize/fake_quantize.cuh"

namespace coreai::cuda {

using cpu::Storage;
constexpr int kConverted = 8;  // elements of a thread

// One value of a type without arithmetic, and of one that holds numbers.
__device__ __forceinline__ float value_of_code(Storage storage, uint32_t code) {
  switch (storage) {
    case Storage::kInt8:
      return static_cast<float>(static_cast<int8_t>(code));
    case Storage::kE4M3:
      return decode_fp8<Lane, Format::kE4M3>(static_cast<int32_t>(code));
    case Storage::kE5M2:
      return decode_fp8<Lane, Format::kE5M2>(static_cast<int32_t>(code));
    default:
      return static_cast<float>(code);
  }
}

__device__ __forceinline__ uint32_t code_of_value(Storage storage, float value) {
  switch (storage) {
    case Storage::kE4M3:
      return static_cast<uint32_t>(encode_fp8<Lane, Format::kE4M3>(value));
    case Storage::kE5M2:
      return static_cast<uint32_t>(encode_fp8<Lane, Format::kE5M2>(value));
    default:  // whole numbers, of which the low byte is kept; NaN has none and becomes 0
      return value != value ? 0 : static_cast<uint32_t>(static_cast<int32_t>(value)) & 0xffu;
  }
}

__device__ __forceinline__ bool is_code(Storage storage) { return storage <= Storage::kE5M2; }

__device__ __forceinline__ float load_one(Storage storage, const void* from, int64_t at) {
  if (is_code(storage)) return value_of_code(storage, static_cast<const uint8_t*>(from)[at]);
  if (storage == Storage::kFloat64) return static_cast<float>(static_cast<const double*>(from)[at]);
  if (storage == Storage::kFloat32) return static_cast<const float*>(from)[at];
  return load_as(storage == Storage::kBFloat16 ? Element::kBFloat16 : Element::kFloat16, from, at);
}

__device__ __forceinline__ void store_one(Storage storage, void* to, int64_t at, float value) {
  if (is_code(storage)) {
    static_cast<uint8_t*>(to)[at] = static_cast<uint8_t>(code_of_value(storage, value));
  } else if (storage == Storage::kFloat64) {
    static_cast<double*>(to)[at] = static_cast<double>(value);
  } else if (storage == Storage::kFloat32) {
    static_cast<float*>(to)[at] = value;
  } else {
    store_as(storage == Storage::kBFloat16 ? Element::kBFloat16 : Element::kFloat16, to, at, value);
  }
}

// Eight values from memory that starts at 16 bytes, `at` being a multiple of eight.
__device__ __forceinline__ void load_eight(Storage storage, const void* from, int64_t at, float (&values)[kConverted]) {
  if (is_code(storage)) {
    const uint2 raw = *reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(from) + at);
#pragma unroll
    for (int i = 0; i < kConverted; ++i) {
      values[i] = value_of_code(storage, (i < 4 ? raw.x : raw.y) >> (8 * (i % 4)) & 0xffu);
    }
  } else if (storage == Storage::kBFloat16) {
    Pack<Element::kBFloat16>::load(static_cast<const uint16_t*>(from) + at).unpack(values);
  } else if (storage == Storage::kFloat16) {
    Pack<Element::kFloat16>::load(static_cast<const uint16_t*>(from) + at).unpack(values);
  } else if (storage == Storage::kFloat32) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float four[4];
      Pack<Element::kFloat32>::load(static_cast<const uint32_t*>(from) + at + 4 * half).unpack(four);
#pragma unroll
      for (int i = 0; i < 4; ++i) values[4 * half + i] = four[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kConverted; ++i) values[i] = load_one(storage, from, at + i);
  }
}

__device__ __forceinline__ void store_eight(Storage storage, void* to, int64_t at, const float (&values)[kConverted]) {
  if (is_code(storage)) {
    uint32_t word[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kConverted; ++i) word[i / 4] |= code_of_value(storage, values[i]) << (8 * (i % 4));
    *reinterpret_cast<uint2*>(static_cast<uint8_t*>(to) + at) = {word[0], word[1]};
  } else if (storage == Storage::kBFloat16) {
    Pack<Element::kBFloat16>::of(values).store(static_cast<uint16_t*>(to) + at);
  } else if (storage == Storage::kFloat16) {
    Pack<Element::kFloat16>::of(values).store(static_cast<uint16_t*>(to) + at);
  } else if (storage == Storage::kFloat32) {
    Pack<Element::kFloat32>::of({values[0], values[1], values[2], values[3]}).store(static_cast<uint32_t*>(to) + at);
    Pack<Element::kFloat32>::of({values[4], values[5], values[6], values[7]}).store(static_cast<uint32_t*>(to) + at + 4);
  } else {
#pragma unroll
    for (int i = 0; i < kConverted; ++i) store_one(storage, to, at + i, values[i]);
  }
}

struct ConvertJob {
  const void* input;
  void* output;
  AffineMap affine;
  cpu::Geometry geometry;
  Storage from, to;
  bool by_eight;  // memory starts at 16 bytes
};

// Quantized values of x, or the values that quantized ones stand for.
template <class K, bool kQuantizes>
__device__ __forceinline__ float convert_value(const AffineMap& a, float x, const BlockParams<K>& p) {
  const float zero_point = a.low - p.low;  // what the range was moved by
  if constexpr (kQuantizes) {
    const float q = quotient_lanes<Lane, K>(x, p);
    if constexpr (K::kFormat == Format::kInt) {
      return clamp_lanes<Lane>(q + zero_point, a.low, a.high);
    } else {
      return round_to_format<Lane, K::kFormat>(clamp_lanes<Lane>(q, a.low, a.high));
    }
  } else {
    return dequantize_lanes<Lane, K>(K::kFormat == Format::kInt ? x - zero_point : x, p);
  }
}

template <class K, bool kQuantizes>
__global__ void __launch_bounds__(kThreads, 4) convert_elements(ConvertJob job) {
  const cpu::Geometry& g = job.geometry;
  const int64_t begin = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kConverted;
  if (begin >= g.numel) return;
  const int64_t length = g.run * g.columns;
  int64_t row = begin / length, base = row_base(g, row);
  int64_t column = begin % length / g.run, place = begin % g.run;
  const auto value = [&](float x, const BlockParams<K>& p) { return convert_value<K, kQuantizes>(job.affine, x, p); };
  if (job.by_eight && g.numel - begin >= kConverted) {
    float values[kConverted];
    load_eight(job.from, job.input, begin, values);
    if (g.run % kConverted == 0) {
      const auto params = BlockParams<K>::load(job.affine, base + column);
#pragma unroll
      for (int i = 0; i < kConverted; ++i) values[i] = value(values[i], params);
    } else {
#pragma unroll
      for (int i = 0; i < kConverted; ++i) {
        values[i] = value(values[i], BlockParams<K>::load(job.affine, base + column));
        if (++place == g.run) place = 0, ++column;
        if (column == g.columns) column = 0, base = row_base(g, ++row);
      }
    }
    return store_eight(job.to, job.output, begin, values);
  }
  for (int64_t at = begin; at < begin + kConverted && at < g.numel; ++at) {
    const auto params = BlockParams<K>::load(job.affine, base + column);
    store_one(job.to, job.output, at, value(load_one(job.from, job.input, at), params));
    if (++place == g.run) place = 0, ++column;
    if (column == g.columns) column = 0, base = row_base(g, ++row);
  }
}

// Host side.

inline Storage storage_as(Element element) {
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

// Queues the kernel for a tensor that is not empty.
template <bool kQuantizes, class Stream>
void queue_convert(const cpu::Convert& job, Stream stream) {
  const Storage element = storage_as(job.element);
  const ConvertJob convert = {.input = job.input,
                              .output = job.output,
                              .affine = AffineMap(job.affine),
                              .geometry = *job.geometry,
                              .from = kQuantizes ? element : job.storage,
                              .to = kQuantizes ? job.storage : element,
                              .by_eight = is_aligned(job.input) && is_aligned(job.output)};
  with_kind(job.affine.format, job.affine.offset != nullptr, [&](auto kind) {
    auto* kernel = &convert_elements<decltype(kind), kQuantizes>;
    COREAI_LAUNCH(kernel, blocks_for((job.geometry->numel + kConverted - 1) / kConverted), kThreads, stream, convert);
  });
}

}  // namespace coreai::cuda
