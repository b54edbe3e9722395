// Parameters of one block in a thread's registers.
#pragma once

#include <cmath>
#include <cstring>

#include "common/around_zero.h"
#include "cpu/kernels.h"
#include "cuda/pack.cuh"

namespace coreai::cuda {

// What kernels are called with: the affine map, and with which bounds its rounding and clamping change at numbers of nine
// bits only, which QuickLane asks for.
struct AffineMap : cpu::Affine {
  bool has_quick_bounds;      // with some zero point, if blocks have their own
  int32_t first_zero_point;   // the least of those
  uint32_t zero_points_more;  // how many there are but for that

  explicit AffineMap(const cpu::Affine& a)
      : cpu::Affine(a), has_quick_bounds(false), first_zero_point(0), zero_points_more(0) {
    constexpr double kMost = 255;
    const auto first = static_cast<double>(low) - constant, last = static_cast<double>(high) - constant;
    if (format != Format::kInt) {
      uint32_t bits;
      memcpy(&bits, &high, sizeof(bits));
      has_quick_bounds = low == -high && (bits & 0x7fff) == 0;
    } else if (!zero_point || offset) {
      has_quick_bounds = first >= -kMost && first <= last && last <= kMost;
    } else if (fabs(first) <= 1e6 && first <= last && ceil(last - kMost) <= floor(first + kMost)) {
      has_quick_bounds = true;
      first_zero_point = static_cast<int32_t>(ceil(last - kMost));
      zero_points_more = static_cast<uint32_t>(static_cast<int32_t>(floor(first + kMost)) - first_zero_point);
    }
  }
};

// `Quick`: what quotients are computed by.
template <class K, class Quick = QuickLane>
struct BlockParams : Params<Lane> {
  static constexpr bool kIsInt = K::kFormat == Format::kInt;

  static __device__ __forceinline__ BlockParams load(const AffineMap& a, int64_t block) {
    if constexpr (K::kHasOffset) return of(a, a.scale[block], 0, a.offset[block]);
    return of(a, a.scale[block], kIsInt && a.zero_point ? a.zero_point[block] : 0, 0.0f);
  }
  // Of the map no more is read than its range. The reciprocal is NaN where there is no quick way: so is then what
  // quantize() gives.
  static __device__ __forceinline__ BlockParams of(const AffineMap& a, float scale, int32_t zero_point, float offset) {
    BlockParams p;
    p.scale = scale;
    p.low = a.low, p.high = a.high, p.offset = 0.0f;
    bool quick = Quick::has_quotient(p.scale) && a.has_quick_bounds;
    if constexpr (K::kHasOffset) {
      p.low -= a.constant, p.high -= a.constant;
      p.offset = offset;
      quick = quick && Lane::as_int(p.offset) != INT32_MIN;  // signs of zeros do not show
    } else if (kIsInt && a.zero_point) {
      p.low -= static_cast<float>(zero_point), p.high -= static_cast<float>(zero_point);
      quick = quick && static_cast<uint32_t>(zero_point) - static_cast<uint32_t>(a.first_zero_point) <= a.zero_points_more;
    }
    p.reciprocal = quick ? Quick::reciprocal(p.scale) : Lane::as_float(INT32_MAX);
    return p;
  }

  // Of floating-point formats, the magnitude.
  __device__ __forceinline__ float quantize(float x, bool& inside) const {
    const Params<Quick> p = {scale, low, high, offset, reciprocal};
    if constexpr (kIsInt) {
      using Finite = typename K::template By<Division::kReciprocalOfFinite>;
      return dequantize_lanes<Quick, K>(quantize_lanes<Quick, Finite>(x, p, inside), p);
    } else {
      return dequantize_lanes<Quick, K>(quantize_magnitude<Quick, K>(x, p, inside), p);
    }
  }
  __device__ __forceinline__ float quantize_exactly(float x, bool& inside) const {
    return dequantize_lanes<Lane, K>(quantize_lanes<Lane, K>(x, *this, inside), *this);
  }
  // What the thread `lane` of the warp has. `with_bounds`: whether zero points may be others than this thread's.
  __device__ __forceinline__ BlockParams of_lane(int lane, bool with_bounds = true) const {
    const auto get = [&](float value) { return __shfl_sync(0xffffffffu, value, lane); };
    BlockParams p = *this;
    p.scale = get(scale), p.reciprocal = get(reciprocal);
    if constexpr (K::kHasOffset) p.offset = get(offset);
    if constexpr (kIsInt && !K::kHasOffset) {
      if (with_bounds) p.low = get(low), p.high = get(high);
    }
    return p;
  }
};

}  // namespace coreai::cuda
