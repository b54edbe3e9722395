// A weight times a mask drawn at random from logits, and its gradients. See reference/sampled_mask.py.
#pragma once

#include "cpu/loops.h"

namespace coreai::cpu::COREAI_LEVEL {
namespace {

// Elements whose random words are made together: 16 calls of Philox side by side, which the compiler vectorizes.
constexpr int64_t kSampled = 64;

template <class = void>
void sampled_words(uint32_t* words, uint64_t block, const SampledMask& job) {
  constexpr int kCalls = kSampled / 4;
  uint32_t c0[kCalls], c1[kCalls], c2[kCalls], c3[kCalls];
  for (int i = 0; i < kCalls; ++i) {
    c0[i] = static_cast<uint32_t>(block + static_cast<uint64_t>(i));
    c1[i] = static_cast<uint32_t>((block + static_cast<uint64_t>(i)) >> 32);
    c2[i] = static_cast<uint32_t>(job.draw);
    c3[i] = static_cast<uint32_t>(job.draw >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(job.seed), k1 = static_cast<uint32_t>(job.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kCalls; ++i) {
      const uint64_t first = static_cast<uint64_t>(c0[i]) * 0xD2511F53u;
      const uint64_t second = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57u;
      c0[i] = static_cast<uint32_t>(second >> 32) ^ c1[i] ^ k0;
      c1[i] = static_cast<uint32_t>(second);
      c2[i] = static_cast<uint32_t>(first >> 32) ^ c3[i] ^ k1;
      c3[i] = static_cast<uint32_t>(first);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < kCalls; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

// Cephes' exponential, after the first coefficient.
constexpr float kExpCoefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                      5.0000001201e-1f};

struct Logistic {
  F a, b;
};

template <class = void>
COREAI_HD Logistic logistic_terms(F s, const uint32_t* words) {
  int32_t random[kWidth];
  for (int i = 0; i < kWidth; ++i) random[i] = static_cast<int32_t>(words[i] >> 9);
  const F u = Simd::mul(Simd::add(Simd::to_float(Simd::load(random)), Simd::set(0.5f)), Simd::set(0x1p-23f));
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
COREAI_HD void sampled_mask_some(const SampledMask& job, int64_t at, int n, const uint32_t* words) {
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
        uint32_t words[kSampled];
        sampled_words(words, static_cast<uint64_t>(begin) / 4, job);
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
