// One value a thread, as common/element.h takes lanes. What a GPU has instructions for is written in PTX; the other
// branch says what they do, and is what the tests run on the CPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/element.h"
#include "cuda/launch.cuh"

namespace coreai::cuda {

// Exact: of any values and scales.
struct Lane {
  using F = float;
  using I = int32_t;
  using M = bool;
  static constexpr bool kHasQuotient = false;

  static COREAI_HD F set(float x) { return x; }
  static COREAI_HD I iset(int32_t x) { return x; }
  static COREAI_HD F add(F a, F b) { return a + b; }
  static COREAI_HD F sub(F a, F b) { return a - b; }
  static COREAI_HD F mul(F a, F b) { return a * b; }
  static COREAI_HD F fma(F a, F b, F c) { return fmaf(a, b, c); }
  static COREAI_HD F mul_add_zero(F a, F b) { return fma(a, b, 0.0f); }
  static COREAI_HD F div(F a, F b) { return a / b; }
  static COREAI_HD F min(F a, F b) { return a < b ? a : b; }
  static COREAI_HD F max(F a, F b) { return a > b ? a : b; }
  static COREAI_HD F round(F a) { return rintf(a); }
  static COREAI_HD I truncate(F a) {  // NaN becomes INT32_MIN
    return a != a ? INT32_MIN : static_cast<int32_t>(a);
  }
  static COREAI_HD F to_float(I a) { return static_cast<float>(a); }
  static COREAI_HD F round_half(F a) {
#if defined(__CUDA_ARCH__)
    F result;
    asm("{ .reg .b16 h; cvt.rn.f16.f32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(result) : "f"(a));
    return result;
#elif defined(COREAI_EMULATED_THREADS)
    return emulation::from_half(emulation::to_half(a));
#else
    return a;  // not called on the host
#endif
  }
  static COREAI_HD F round_bfloat16(F a) {
#if defined(__CUDA_ARCH__)
    int32_t result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(a), "f"(0.0f));  // the first is the upper half
    return as_float(result);
#elif defined(COREAI_EMULATED_THREADS)
    return as_float(static_cast<int32_t>(uint32_t{emulation::to_bfloat16(a)} << 16));
#else
    return a;  // not called on the host
#endif
  }
  static COREAI_HD M equal(F a, F b) { return a == b; }
  static COREAI_HD M greater(F a, F b) { return a > b; }
  static COREAI_HD M unordered(F a, F b) { return a != a || b != b; }
  static COREAI_HD F select(M m, F a, F b) { return m ? a : b; }
  static COREAI_HD I as_int(F a) {
#if defined(__CUDA_ARCH__)
    return __float_as_int(a);
#else
    I result;
    __builtin_memcpy(&result, &a, sizeof(result));
    return result;
#endif
  }
  static COREAI_HD F as_float(I a) {
#if defined(__CUDA_ARCH__)
    return __int_as_float(a);
#else
    F result;
    __builtin_memcpy(&result, &a, sizeof(result));
    return result;
#endif
  }
  static COREAI_HD I iand(I a, I b) { return a & b; }
  static COREAI_HD I ior(I a, I b) { return a | b; }
  static COREAI_HD I iadd(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }
  static COREAI_HD I imax(I a, I b) { return a > b ? a : b; }
  static COREAI_HD I imin(I a, I b) { return a < b ? a : b; }
  template <int kBits>
  static COREAI_HD I shr(I a) {
    return static_cast<I>(static_cast<uint32_t>(a) >> kBits);
  }
  template <int kBits>
  static COREAI_HD I shl(I a) {
    return static_cast<I>(static_cast<uint32_t>(a) << kBits);
  }
};

// Of scales that has_quotient() is true of and of bounds of up to nine bits, a few instructions each. Where a quotient is
// no finite number, the result is NaN, and `Lane` has to do it again.
struct QuickLane : Lane {
  // What an instruction makes of 1 / a: one unit in the last place off, either way.
  static COREAI_HD F near_reciprocal(F a) {
#if defined(__CUDA_ARCH__)
    F result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
    return result;
#else
    return as_float(as_int(1.0f / a) + as_int(a) % 3 - 1);
#endif
  }
  // Newton's step makes it the nearest number for all but 33 mantissas of a, and the step below forgives those, but for
  // the mantissa of all ones.
  static COREAI_HD F reciprocal(F a) {
    const F near = near_reciprocal(a);
    return fma(fma(-a, near, 1.0f), near, near);
  }
  static COREAI_HD M has_quotient(F scale) {
    return scale >= 0x1p-64f && scale <= 0x1p64f && ((as_int(scale) + 1) & 0x7fffff) != 0;
  }
  // As `finite_quotient` of cpu/simd_avx512.h, which says when it is as good as a division. That it is so with the
  // reciprocals above was seen in the same way, starting from each number up to two units off the reciprocal: all
  // mantissas of b with all numbers of nine bits, and the four values of a on either side of their product.
  static COREAI_HD F finite_quotient(F a, F b, F reciprocal) {
    const F product = a * reciprocal;
    return fma(fma(-product, b, a), reciprocal, product);
  }
  static COREAI_HD F magnitude(F a) { return fabsf(a); }
  // The sign of zeros is lost. Of what is beyond 2^22, which no range reaches, the order is kept.
  static COREAI_HD F round(F a) { return (a + 0x1.8p23f) - 0x1.8p23f; }
  static COREAI_HD F min(F a, F b) {  // NaN of either stays
#if defined(__CUDA_ARCH__)
    F result;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
#else
    return a != a || a < b ? a : b;
#endif
  }
  static COREAI_HD F max(F a, F b) {
#if defined(__CUDA_ARCH__)
    F result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
#else
    return a != a || a > b ? a : b;
#endif
  }
  // Nothing else is made of NaN than NaN.
  static COREAI_HD M unordered(F, F) { return false; }
};

// The same of scales that are powers of two: a product with the reciprocal, which is exact, is rounded as the quotient is,
// be it subnormal or infinite.
struct PowerLane : QuickLane {
  static COREAI_HD F reciprocal(F a) { return as_float(0x7f000000 - as_int(a)); }
  static COREAI_HD M has_quotient(F scale) { return scale >= 0x1p-126f && scale <= 0x1p126f; }
  static COREAI_HD F finite_quotient(F a, F, F reciprocal) { return a * reciprocal; }
};

}  // namespace coreai::cuda
