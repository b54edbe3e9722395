// A weight times a mask drawn at random from logits, and its gradients. See reference/sampled_mask.py.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "cpu/loops.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

// PhiloxLanes of several calls of Philox side by side, in the low halves of 64-bit lanes; the high halves are junk.
#if defined(__AVX512F__)
constexpr int kCalls = 8;
#elif defined(__AVX2__)
constexpr int kCalls = 4;
#else
constexpr int kCalls = 2;
#endif
typedef uint64_t PhiloxLanes __attribute__((vector_size(8 * kCalls)));

// Vectors of calls that take turns, so that products of one need not be waited for.
constexpr int kGroups = 4;
// Elements whose random words are made together.
constexpr int64_t kSampled = 4 * kCalls * kGroups;

// Products of the low halves. The compiler finds the instruction for them by itself nowhere.
COREAI_HD PhiloxLanes product(PhiloxLanes a, PhiloxLanes b) {
#if defined(__AVX512F__)
  return reinterpret_cast<PhiloxLanes>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<PhiloxLanes>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<PhiloxLanes>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#elif defined(__ARM_NEON)
  return reinterpret_cast<PhiloxLanes>(
      vmull_u32(vmovn_u64(reinterpret_cast<uint64x2_t>(a)), vmovn_u64(reinterpret_cast<uint64x2_t>(b))));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Lanes first, first + 1... of `a` and of `b` in turns.
template <int first>
COREAI_HD PhiloxLanes interleaved(PhiloxLanes a, PhiloxLanes b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, first, first + 8, first + 1, first + 9, first + 2, first + 10, first + 3, first + 11);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, first, first + 4, first + 1, first + 5);
#else
  return __builtin_shufflevector(a, b, first, first + 2);
#endif
}

template <class = void>
COREAI_HD void sampled_words(int32_t* words, uint64_t block, const SampledMask& job) {
  PhiloxLanes lane, c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
  for (int i = 0; i < kCalls; ++i) lane[i] = static_cast<uint64_t>(i);
  for (int group = 0; group < kGroups; ++group) {
    c0[group] = lane + (block + static_cast<uint64_t>(group * kCalls));
    c1[group] = c0[group] >> 32;
    c2[group] = PhiloxLanes{} + job.draw;
    c3[group] = PhiloxLanes{} + (job.draw >> 32);
  }
  const PhiloxLanes first_factor = PhiloxLanes{} + 0xD2511F53u, second_factor = PhiloxLanes{} + 0xCD9E8D57u;
  uint32_t k0 = static_cast<uint32_t>(job.seed), k1 = static_cast<uint32_t>(job.seed >> 32);
  for (int round = 0; round < 7; ++round) {
    for (int group = 0; group < kGroups; ++group) {
      const PhiloxLanes first = product(c0[group], first_factor), second = product(c2[group], second_factor);
      c0[group] = (second >> 32) ^ c1[group] ^ k0;
      c1[group] = second;
      c2[group] = (first >> 32) ^ c3[group] ^ k1;
      c3[group] = first;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int group = 0; group < kGroups; ++group) {
    const PhiloxLanes even = (c0[group] & 0xffffffffu) | (c1[group] << 32);
    const PhiloxLanes odd = (c2[group] & 0xffffffffu) | (c3[group] << 32);
    const PhiloxLanes pairs[2] = {interleaved<0>(even, odd), interleaved<kCalls / 2>(even, odd)};
    __builtin_memcpy(words + 4 * kCalls * group, pairs, sizeof(pairs));
  }
}

// Of 2**f around 0, after the first coefficient.
constexpr float kExp2Coefficients[] = {9.671513e-3f, 5.5507336e-2f, 2.4022242e-1f, 6.9314700e-1f, 1.0f};

struct Logistic {
  F a, b;
};

template <class = void>
COREAI_HD Logistic logistic_terms(F s, const int32_t* words) {
  // 1 + k / 2**23, less what leaves (k + 1/2) / 2**23: exact.
  const I mantissa = Simd::ior(Simd::template shr<9>(Simd::load(words)), Simd::iset(0x3f800000));
  const F u = Simd::sub(Simd::as_float(mantissa), Simd::set(1.0f - 0x1p-24f));
  const F x = Simd::min(Simd::max(s, Simd::set(-64.0f)), Simd::set(64.0f));
  const F t = Simd::mul(x, Simd::set(1.44269504088896341f));
  // The sum has no bits below 1, and the rounded t in its lowest ones.
  const F shift = Simd::set(0x1.8p23f), sum = Simd::add(t, shift);
  const F f = Simd::sub(t, Simd::sub(sum, shift));
  F p = Simd::set(1.3264727e-3f);
  for (const float coefficient : kExp2Coefficients) {
    p = Simd::add(Simd::mul(p, f), Simd::set(coefficient));
  }
  const F power = Simd::as_float(Simd::iadd(Simd::as_int(p), Simd::template shl<23>(Simd::as_int(sum))));
  return {Simd::mul(u, power), Simd::sub(Simd::set(1.0f), u)};
}

// 1 where a > b, else 0.
COREAI_HD F kept(const Logistic& l) { return Simd::select(Simd::greater(l.a, l.b), Simd::set(1.0f), Simd::set(0.0f)); }

template <class T>
COREAI_HD void sampled_mask_some(const SampledMask& job, int64_t at, int n, const int32_t* words) {
  const T* weight = static_cast<const T*>(job.weight) + at;
  const bool whole = n == kWidth;
  const F w = whole ? Simd::load(weight) : Simd::load_n(weight, n);
  const Logistic l = logistic_terms(whole ? Simd::load(job.logits + at) : Simd::load_n(job.logits + at, n), words);
  T* out = static_cast<T*>(job.output) + at;
  if (job.grad == nullptr) {
    const F y = Simd::mul(w, kept(l));
    return whole ? Simd::store(out, y) : Simd::store_n(out, y, n);
  }
  const T* grad = static_cast<const T*>(job.grad) + at;
  const F g = whole ? Simd::load(grad) : Simd::load_n(grad, n);
  const F inverse = Simd::div(Simd::set(1.0f), Simd::add(l.a, l.b));
  const F slope = Simd::mul(Simd::mul(l.a, inverse), Simd::mul(l.b, inverse));
  const F to_weight = Simd::mul(g, kept(l)), to_logits = Simd::mul(Simd::mul(g, w), slope);
  if (whole) {
    Simd::store(out, to_weight);
    Simd::store(job.to_logits + at, to_logits);
  } else {
    Simd::store_n(out, to_weight, n);
    Simd::store_n(job.to_logits + at, to_logits, n);
  }
}

void sampled_mask(const SampledMask& job) {
  with_type(job.element, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(job.numel, kAlignment, kParallelElements / 2, [&](int64_t begin, int64_t end) {
      for (; begin < end; begin += kSampled) {
        alignas(64) int32_t words[kSampled];
        sampled_words(words, static_cast<uint64_t>(begin) / 4, job);
        const int64_t n = min(kSampled, end - begin);
        for (int64_t i = 0; i < n; i += kWidth) {
          sampled_mask_some<T>(job, begin + i, static_cast<int>(min<int64_t>(kWidth, n - i)), words + i);
        }
      }
    });
  });
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
