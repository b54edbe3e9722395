// The lowest and the highest of many elements. NaN wins over numbers.
#pragma once

#include "common/qparams.h"
#include "cuda/quantize/tiles.cuh"

namespace coreai::cuda {

using Range = ValueRange<Lane>;

__device__ __forceinline__ Range no_range() { return {Lane::as_float(0x7f800000), Lane::as_float(INT32_MIN | 0x7f800000)}; }

// Of one bound and another: NaN of either stays.
__device__ __forceinline__ void merge(Range& range, Range other) {
  range.low = QuickLane::min(range.low, other.low);
  range.high = QuickLane::max(range.high, other.high);
}

// The lower, or the higher, of two pairs of 16-bit elements.
template <Element kElement, bool kHigher>
__device__ __forceinline__ uint32_t extreme_of_pairs(uint32_t a, uint32_t b) {
#if defined(COREAI_EMULATED_THREADS)
  const auto of = [&](int shift) {
    const float x = widen<kElement>(a >> shift & 0xffff), y = widen<kElement>(b >> shift & 0xffff);
    return kHigher ? QuickLane::max(x, y) : QuickLane::min(x, y);
  };
  return narrow<kElement>(of(0), of(16));
#else
  uint32_t result;
  if constexpr (kElement == Element::kBFloat16) {
    if constexpr (kHigher) {
      asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    } else {
      asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    }
  } else {
    if constexpr (kHigher) {
      asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    } else {
      asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    }
  }
  return result;
#endif
}

// What a thread has met of a block, a pack at a time: 16-bit elements two to an instruction.
template <Element kElement>
class Extremes {
 public:
  Extremes() = default;
  // Of a range that zero is in anyway.
  static __device__ __forceinline__ Extremes with_zero() {
    Extremes extremes;
    extremes.floats_ = {0.0f, 0.0f};
    extremes.low_ = extremes.high_ = 0;
    return extremes;
  }
  __device__ __forceinline__ void take(const Pack<kElement>& pack) {
    if constexpr (kElement == Element::kFloat32) {
      float values[4];
      pack.unpack(values);
#pragma unroll
      for (int i = 0; i < 4; ++i) merge(floats_, {values[i], values[i]});
    } else {
      const uint32_t words[4] = {pack.raw.x, pack.raw.y, pack.raw.z, pack.raw.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        low_ = extreme_of_pairs<kElement, false>(low_, words[i]);
        high_ = extreme_of_pairs<kElement, true>(high_, words[i]);
      }
    }
  }
  __device__ __forceinline__ Range range() const {
    if constexpr (kElement == Element::kFloat32) {
      return floats_;
    } else {
      Range range = {widen<kElement>(low_ & 0xffffu), widen<kElement>(high_ & 0xffffu)};
      merge(range, {widen<kElement>(low_ >> 16), widen<kElement>(high_ >> 16)});
      return range;
    }
  }

 private:
  static constexpr uint32_t kInfinities = static_cast<uint32_t>(Magnitude<kElement>::kInfinity) * 0x10001u;
  Range floats_ = no_range();
  uint32_t low_ = kInfinities, high_ = kInfinities | 0x80008000u;
};

// What a thread has met of the columns of a pack, each apart: of every one a pair of bounds, as wide as elements are.
template <Element kElement>
struct ColumnExtremes {
  static constexpr bool kIsWide = kElement == Element::kFloat32;
  static constexpr auto kInfinity = static_cast<uint32_t>(Magnitude<kElement>::kInfinity);
  static constexpr uint32_t kMost = kIsWide ? kInfinity : kInfinity * 0x10001u;
  static constexpr uint32_t kLeast = kMost | (kIsWide ? 0x80000000u : 0x80008000u);
  uint32_t low[4] = {kMost, kMost, kMost, kMost}, high[4] = {kLeast, kLeast, kLeast, kLeast};

  // Of ranges that zero is in anyway.
  static __device__ __forceinline__ ColumnExtremes with_zero() { return {{0, 0, 0, 0}, {0, 0, 0, 0}}; }
  __device__ __forceinline__ uint4 lowest() const { return {low[0], low[1], low[2], low[3]}; }
  __device__ __forceinline__ uint4 highest() const { return {high[0], high[1], high[2], high[3]}; }
  __device__ __forceinline__ void take(uint4 lower, uint4 higher) {
    const uint32_t below[4] = {lower.x, lower.y, lower.z, lower.w}, above[4] = {higher.x, higher.y, higher.z, higher.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kIsWide) {
        const auto value = [](uint32_t word) { return Lane::as_float(static_cast<int32_t>(word)); };
        low[i] = static_cast<uint32_t>(Lane::as_int(QuickLane::min(value(low[i]), value(below[i]))));
        high[i] = static_cast<uint32_t>(Lane::as_int(QuickLane::max(value(high[i]), value(above[i]))));
      } else {
        low[i] = extreme_of_pairs<kElement, false>(low[i], below[i]);
        high[i] = extreme_of_pairs<kElement, true>(high[i], above[i]);
      }
    }
  }
};

// Of `width` neighbouring lanes, a power of two.
__device__ __forceinline__ Range range_of_lanes(Range range, int width) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    if (distance >= width) continue;
    merge(range, {__shfl_xor_sync(0xffffffffu, range.low, distance), __shfl_xor_sync(0xffffffffu, range.high, distance)});
  }
  return range;
}

// Of the threads of a block of threads. All come here, and all get it.
__device__ __forceinline__ Range range_of_threads(Range range) {
  __shared__ Range of_warps[kThreads / kWarp];
  range = range_of_lanes(range, kWarp);
  __syncthreads();  // an earlier call's readers are done
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = range;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kThreads / kWarp; ++i) merge(range, of_warps[i]);
  return range;
}

}  // namespace coreai::cuda
