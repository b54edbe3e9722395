// fake_quantize_by_reciprocal: torchao's simulator, which multiplies by the reciprocal of a scale and whose gradient is
// multiplied by both. Blocks are rows of `run` neighbouring elements, a multiple of eight: each begins a byte of the mask.
#pragma once

#include "cpu/quantize/block_ranges.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

// Parameters of kWidth blocks, one a lane, as choose_qparams_affine of torchao computes them.
template <class = void>
COREAI_HD void choose_for_reciprocal(const ByReciprocal& job, Range range, F& scale, I& zero_point) {
  const F low = Simd::set(job.low), high = Simd::set(job.high), eps = Simd::set(job.eps);
  const F width = Simd::set(job.high - job.low);
  if (job.is_symmetric) {
    const F largest = Simd::max(Simd::sub(Simd::set(0.0f), range.low), range.high);
    scale = Simd::max(eps, Simd::div(largest, Simd::mul(width, Simd::set(0.5f))));
    zero_point = Simd::iset(0);
    return;
  }
  scale = Simd::max(eps, Simd::div(Simd::sub(range.high, range.low), width));
  zero_point = Simd::truncate(clamp_lanes<Simd>(Simd::sub(low, Simd::round(Simd::div(range.low, scale))), low, high));
}

// Elements of one block. `low`, `high`: the quantized range less the zero point.
template <bool kMask>
COREAI_HD void simulate_run(const float* x, float* y, uint8_t* mask, int64_t n, F scale, F reciprocal, F low, F high) {
  const auto simulate = [&](F value, F& result) __attribute__((always_inline)) {
    const F q = Simd::round(Simd::mul(value, reciprocal)), clamped = clamp_lanes<Simd>(q, low, high);
    result = Simd::mul(Simd::add(clamped, Simd::set(0.0f)), scale);  // the sum turns -0.0 into 0.0
    return Simd::equal(q, clamped);
  };
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    F a, b;
    const M inside[2] = {simulate(Simd::load(x + i), a), simulate(Simd::load(x + i + kWidth), b)};
    Simd::store_pair(y + i, a, b);
    if constexpr (kMask) {
      BitWriter::Cursor cursor = mask + i / 8;
      put_masks<BitWriter>(cursor, inside[0], inside[1]);
    }
  }
  for (; i < n; i += kWidth) {
    const int some = static_cast<int>(min<int64_t>(kWidth, n - i));
    F a;
    const M inside = simulate(Simd::load_n(x + i, some), a);
    Simd::store_n(y + i, a, some);
    for (int byte = 0; kMask && byte < some / 8; ++byte)
      mask[i / 8 + byte] = static_cast<uint8_t>(Simd::bits(inside) >> 8 * byte);
  }
}

void fake_quantize_by_reciprocal(const ByReciprocal& job) {
  const int64_t run = job.run;
  parallel_for(job.blocks, kWidth, max<int64_t>(1, kParallelElements / run), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block += kWidth) {
      const int n = static_cast<int>(min<int64_t>(kWidth, end - block));
      const int64_t first = block * run;
      alignas(64) float scale[kWidth], reciprocal[kWidth], low[kWidth], high[kWidth];
      alignas(64) int32_t zero_point[kWidth] = {};
      if (job.chooses) {
        F chosen;
        I point;
        choose_for_reciprocal(job, range_of_blocks<true>(job.input + first, run, n), chosen, point);
        Simd::store_n(job.scale + block, chosen, n);
        Simd::store_n(job.zero_point + block, point, n);
      }
      for (int i = 0; i < n; ++i) zero_point[i] = job.zero_point[block + i];
      const F scales = Simd::load_n(job.scale + block, n), points = Simd::to_float(Simd::load(zero_point));
      Simd::store(scale, scales);
      Simd::store(reciprocal, Simd::div(Simd::set(1.0f), scales));
      Simd::store(low, Simd::sub(Simd::set(job.low), points));
      Simd::store(high, Simd::sub(Simd::set(job.high), points));
      for (int i = 0; i < n; ++i) {
        const int64_t at = first + i * run;
        const auto simulate = job.mask ? &simulate_run<true> : &simulate_run<false>;
        simulate(job.input + at, job.output + at, job.mask ? job.mask + at / 8 : nullptr, run, Simd::set(scale[i]),
                 Simd::set(reciprocal[i]), Simd::set(low[i]), Simd::set(high[i]));
      }
    }
  });
}

// The gradient: what is outside is zero, with the sign of nothing.
void by_reciprocal_backward(const ByReciprocalBackward& job) {
  const int64_t run = job.run;
  parallel_for(job.blocks, 1, max<int64_t>(1, kParallelElements / run), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const float* grad = job.grad + block * run;
      float* out = job.output + block * run;
      const uint8_t* mask = job.mask + block * run / 8;
      const F scale = Simd::set(job.scale[block]), zero = Simd::set(0.0f);
      const F reciprocal = Simd::div(Simd::set(1.0f), scale);
      const auto masked = [&](F value, uint32_t bits) __attribute__((always_inline)) {
        return Simd::mul(Simd::select(Simd::from_bits(bits), Simd::mul(value, scale), zero), reciprocal);
      };
      int64_t i = 0;
      for (; i + kWidth <= run; i += kWidth) {
        uint32_t bits = 0;
        __builtin_memcpy(&bits, mask + i / 8, kWidth / 8);
        Simd::store(out + i, masked(Simd::load(grad + i), bits));
      }
      if (i < run) Simd::store_n(out + i, masked(Simd::load_n(grad + i, 8), mask[i / 8]), 8);
    }
  });
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
