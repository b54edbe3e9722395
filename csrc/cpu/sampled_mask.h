// A weight times a mask drawn at random from logits, and its gradients. See reference/sampled_mask.py.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/loops.h"

namespace coreai::cpu::COREAI_LEVEL {
namespace {

// Elements whose random words are made together.
constexpr int64_t kSampled = 64;

// PhiloxLanes of several calls of Philox side by side, in the low halves of 64-bit lanes; the high halves are junk.
#if defined(__AVX512F__)
constexpr int kCalls = 8;
#elif defined(__AVX2__)
constexpr int kCalls = 4;
#else
constexpr int kCalls = 2;
#endif
typedef uint64_t PhiloxLanes __attribute__((vector_size(8 * kCalls)));

// Products of the low halves. The compiler finds the instruction for them by itself nowhere.
COREAI_HD PhiloxLanes product(PhiloxLanes a, PhiloxLanes b) {
#if defined(__AVX512F__)
  return reinterpret_cast<PhiloxLanes>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<PhiloxLanes>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<PhiloxLanes>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

template <class = void>
COREAI_HD void sampled_words(uint64_t* words, uint64_t block, const SampledMask& job) {
  constexpr int kGroups = static_cast<int>(kSampled) / 4 / kCalls;
  PhiloxLanes c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
  for (int group = 0; group < kGroups; ++group) {
    for (int i = 0; i < kCalls; ++i) {
      const uint64_t call = block + static_cast<uint64_t>(group * kCalls + i);
      c0[group][i] = call;
      c1[group][i] = call >> 32;
    }
    c2[group] = PhiloxLanes{} + job.draw;
    c3[group] = PhiloxLanes{} + (job.draw >> 32);
  }
  const PhiloxLanes first_factor = PhiloxLanes{} + 0xD2511F53u, second_factor = PhiloxLanes{} + 0xCD9E8D57u;
  uint32_t k0 = static_cast<uint32_t>(job.seed), k1 = static_cast<uint32_t>(job.seed >> 32);
  for (int round = 0; round < 10; ++round) {
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
    for (int i = 0; i < kCalls; ++i) {
      words[2 * (group * kCalls + i)] = even[i];
      words[2 * (group * kCalls + i) + 1] = odd[i];
    }
  }
}

// Cephes' exponential, after the first coefficient.
constexpr float kExpCoefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                      5.0000001201e-1f};

struct Logistic {
  F a, b;
};

template <class = void>
COREAI_HD Logistic logistic_terms(F s, const int32_t* words) {
  const F random = Simd::to_float(Simd::template shr<9>(Simd::load(words)));
  const F u = Simd::mul(Simd::add(random, Simd::set(0.5f)), Simd::set(0x1p-23f));
  const F x = Simd::min(Simd::max(s, Simd::set(-80.0f)), Simd::set(80.0f));
  const F n = Simd::round(Simd::mul(x, Simd::set(1.44269504088896341f)));
  const F r = Simd::sub(Simd::sub(x, Simd::mul(n, Simd::set(0.693359375f))),
                        Simd::mul(n, Simd::set(-2.12194440e-4f)));
  F p = Simd::set(1.9875691500e-4f);
  for (const float coefficient : kExpCoefficients) {
    p = Simd::add(Simd::mul(p, r), Simd::set(coefficient));
  }
  p = Simd::add(Simd::add(Simd::mul(p, Simd::mul(r, r)), r), Simd::set(1.0f));
  const I exponent = Simd::template shl<23>(Simd::iadd(Simd::truncate(n), Simd::iset(127)));
  return {Simd::mul(u, Simd::mul(p, Simd::as_float(exponent))), Simd::sub(Simd::set(1.0f), u)};
}

// 1 where a > b, else 0.
COREAI_HD F kept(const Logistic& l) {
  const F zero = Simd::set(0.0f), one = Simd::set(1.0f);
  return Simd::select(Simd::equal(l.a, l.b), zero, Simd::select(Simd::equal(Simd::max(l.a, l.b), l.a), one, zero));
}

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
  const F d = Simd::add(l.a, l.b);
  const F slope = Simd::mul(Simd::div(l.a, d), Simd::div(l.b, d));
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
    share(job.numel, kAlignment, kParallelElements / 8, [&](int64_t begin, int64_t end) {
      for (; begin < end; begin += kSampled) {
        alignas(64) uint64_t pairs[kSampled / 2];
        alignas(64) int32_t words[kSampled];
        sampled_words(pairs, static_cast<uint64_t>(begin) / 4, job);
        __builtin_memcpy(words, pairs, sizeof(words));
        const int64_t n = smaller(kSampled, end - begin);
        for (int64_t i = 0; i < n; i += kWidth) {
          sampled_mask_some<T>(job, begin + i, static_cast<int>(smaller<int64_t>(kWidth, n - i)), words + i);
        }
      }
    });
  });
}

}  // namespace
}  // namespace coreai::cpu::COREAI_LEVEL
