// Differentiable k-means: the attention of vectors over the centroids of their block, never stored. See
// kernels/coreai_kernels/reference/soft_palettize.py for the formulas.
#pragma once

#include "cpu/simd_table.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

// exp(x) for x <= 0, to two units in the last place; 0 below -87. Cephes' polynomial on [-ln(2)/2, ln(2)/2].
COREAI_HD F exp_nonpositive(F x) {
  const F least = Simd::set(-87.0f);
  const F clamped = Simd::max(x, least);
  const F power = Simd::round(Simd::mul(clamped, Simd::set(1.44269504f)));
  F r = Simd::sub(clamped, Simd::mul(power, Simd::set(0.693359375f)));
  r = Simd::sub(r, Simd::mul(power, Simd::set(-2.12194440e-4f)));
  constexpr float kTerms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  F y = Simd::set(1.9875691500e-4f);
  for (const float term : kTerms) y = Simd::add(Simd::mul(y, r), Simd::set(term));
  y = Simd::add(Simd::add(Simd::mul(y, Simd::mul(r, r)), r), Simd::set(1.0f));
  const I exponent = Simd::template shl<23>(Simd::iadd(Simd::truncate(power), Simd::iset(127)));
  y = Simd::mul(y, Simd::as_float(exponent));
  y = Simd::select(Simd::equal(clamped, least), Simd::set(0.0f), y);
  return Simd::select(Simd::unordered(x, x), x, y);
}

// Vectors whose sums are kept in float32, a sum for each lane, before they enter the float64 ones.
constexpr int kFlushInterval = 32;

// Elements of any type come and go by these: next to what is done with a vector, asking for the type each time is
// nothing, and each copy of what is done takes seconds to compile.
template <class = void>
__attribute__((noinline)) F load_any(Element element, const void* from, int64_t at, int lanes) {
  F x = {};
  with_type(element, [&](auto type) {
    using T = typename decltype(type)::type;
    x = load_lanes(static_cast<const T*>(from) + at, lanes);
  });
  return x;
}

template <class = void>
__attribute__((noinline)) void store_any(Element element, void* to, int64_t at, F x, int lanes) {
  with_type(element, [&](auto type) {
    using T = typename decltype(type)::type;
    T* out = static_cast<T*>(to) + at;
    lanes == kWidth ? Simd::store(out, x) : Simd::store_n(out, x, lanes);
  });
}

template <SoftStep kStep, bool kScalar>
class SoftStretch {
  static constexpr bool kReadsGrad = kStep == SoftStep::kPalettizeBackward;
  static constexpr bool kBackward = kReadsGrad || kStep == SoftStep::kCentroidsBackward;
  static constexpr bool kSums = kStep != SoftStep::kPalettize;
  static constexpr bool kWrites = kStep != SoftStep::kCentroids;

 public:
  SoftStretch(const Soft& job, int64_t position, int64_t block)
      : job_(job),
        dim_(kScalar ? 1 : job.layout.dim),
        clusters_(job.clusters),
        row_(job.layout.row),
        at_(entry_of(job.layout, position)),
        first_(block * job.clusters),
        table_(job.centroids + first_ * dim_),
        x_(job.scratch),
        g_(x_ + kWidth * dim_),
        y_(g_ + kWidth * dim_),
        a_(y_ + kWidth * dim_),
        mass_(a_ + kWidth * clusters_),
        sums_(mass_ + kWidth * clusters_) {}

  void run(int64_t count) {
    if (kSums) clear();
    int unflushed = 0;
    for (int64_t i = 0; i < count; i += kWidth, at_ += kWidth) {
      const int lanes = static_cast<int>(min<int64_t>(kWidth, count - i));
      attend(lanes);
      if constexpr (kStep == SoftStep::kPalettize) {
        average();
      } else if constexpr (kStep == SoftStep::kCentroids) {
        add_up();
      } else {
        differentiate(lanes);
      }
      if (kWrites) store(lanes);
      if (kSums && ++unflushed == kFlushInterval) flush(), clear(), unflushed = 0;
    }
    if (kSums && unflushed > 0) flush();
  }

 private:
  static COREAI_HD F lane(const float* lanes, int64_t i) { return Simd::load(lanes + i * kWidth); }
  static COREAI_HD void put(float* lanes, int64_t i, F x) { Simd::store(lanes + i * kWidth, x); }
  static COREAI_HD F times_add(F a, F b, F c) { return Simd::add(Simd::mul(a, b), c); }
  COREAI_HD F entry(int64_t cluster, int64_t t) const { return Simd::set(table_[cluster * dim_ + t]); }

  // a_ becomes the attention, and 0 in lanes beyond `lanes`.
  COREAI_HD void attend(int lanes) {
    for (int64_t t = 0; t < dim_; ++t) put(x_, t, load_any(job_.element, job_.weight, at_ + t * row_, lanes));
    F least = Simd::set(__builtin_inff());
    for (int64_t j = 0; j < clusters_; ++j) {
      F distance = Simd::set(0.0f);
      for (int64_t t = 0; t < dim_; ++t) {
        const F difference = Simd::sub(lane(x_, t), entry(j, t));
        distance = times_add(difference, difference, distance);
      }
      put(a_, j, distance);
      least = Simd::min(distance, least);
    }
    F total = Simd::set(0.0f);
    const F sharpness = Simd::set(job_.sharpness);
    for (int64_t j = 0; j < clusters_; ++j) {
      const F e = exp_nonpositive(Simd::mul(Simd::sub(least, lane(a_, j)), sharpness));
      put(a_, j, e);
      total = Simd::add(total, e);
    }
    const F share = Simd::select(Simd::first(lanes), Simd::div(Simd::set(1.0f), total), Simd::set(0.0f));
    for (int64_t j = 0; j < clusters_; ++j) put(a_, j, Simd::mul(lane(a_, j), share));
  }

  COREAI_HD void average() {
    for (int64_t t = 0; t < dim_; ++t) {
      F y = Simd::set(0.0f);
      for (int64_t j = 0; j < clusters_; ++j) y = times_add(lane(a_, j), entry(j, t), y);
      put(y_, t, y);
    }
  }

  COREAI_HD void add_up() {
    for (int64_t j = 0; j < clusters_; ++j) {
      const F a = lane(a_, j);
      put(mass_, j, Simd::add(lane(mass_, j), a));
      for (int64_t t = 0; t < dim_; ++t) add_sum(j, t, Simd::mul(a, lane(x_, t)));
    }
  }

  // Gradient to the attention of cluster j.
  COREAI_HD F slope(int64_t j) const {
    F u = kReadsGrad ? Simd::set(0.0f) : Simd::set(-job_.offsets[first_ + j]);
    for (int64_t t = 0; t < dim_; ++t) {
      u = kReadsGrad ? times_add(lane(g_, t), entry(j, t), u) : times_add(rate(j, t), lane(x_, t), u);
    }
    return u;
  }

  COREAI_HD F rate(int64_t j, int64_t t) const { return Simd::set(job_.rates[(first_ + j) * dim_ + t]); }

  COREAI_HD void differentiate(int lanes) {
    if (kReadsGrad) {
      for (int64_t t = 0; t < dim_; ++t) put(g_, t, load_any(job_.element, job_.grad, at_ + t * row_, lanes));
    }
    F mean = Simd::set(0.0f);
    for (int64_t j = 0; j < clusters_; ++j) mean = times_add(lane(a_, j), slope(j), mean);
    for (int64_t t = 0; t < dim_; ++t) put(y_, t, Simd::set(0.0f));
    const F twice = Simd::set(2.0f * job_.sharpness);
    for (int64_t j = 0; j < clusters_; ++j) {
      const F a = lane(a_, j), p = Simd::mul(Simd::mul(a, Simd::sub(slope(j), mean)), twice);
      for (int64_t t = 0; t < dim_; ++t) {
        F y = times_add(p, entry(j, t), lane(y_, t));
        if (!kReadsGrad) y = times_add(a, rate(j, t), y);
        put(y_, t, y);
        F sum = Simd::mul(p, Simd::sub(lane(x_, t), entry(j, t)));
        if (kReadsGrad) sum = times_add(a, lane(g_, t), sum);
        add_sum(j, t, sum);
      }
    }
  }

  COREAI_HD void store(int lanes) {
    for (int64_t t = 0; t < dim_; ++t) {
      store_any(job_.element, job_.output, at_ + t * row_, lane(y_, t), lanes);
    }
  }

  COREAI_HD void add_sum(int64_t j, int64_t t, F x) { put(sums_, j * dim_ + t, Simd::add(lane(sums_, j * dim_ + t), x)); }

  void clear() {
    for (int64_t i = 0; i < clusters_; ++i) put(mass_, i, Simd::set(0.0f));
    for (int64_t i = 0; i < clusters_ * dim_; ++i) put(sums_, i, Simd::set(0.0f));
  }

  void flush() {
    for (int64_t i = 0; i < clusters_ * dim_; ++i) job_.sums[first_ * dim_ + i] += across(sums_ + i * kWidth);
    if constexpr (kStep == SoftStep::kCentroids) {
      for (int64_t i = 0; i < clusters_; ++i) job_.masses[first_ + i] += across(mass_ + i * kWidth);
    }
  }

  static double across(const float* lanes) {
    double sum = 0;
    for (int i = 0; i < kWidth; ++i) sum += lanes[i];
    return sum;
  }

  const Soft& job_;
  const int64_t dim_, clusters_, row_;
  int64_t at_;
  const int64_t first_;
  const float* table_;
  float *x_, *g_, *y_, *a_, *mass_, *sums_;
};

template <SoftStep kStep>
void soft_step(const Soft& job) {
  over_stretches(job.layout, job.first, job.last, [&](int64_t position, int64_t count, int64_t block) {
    if (job.layout.dim == 1) {
      SoftStretch<kStep, true>(job, position, block).run(count);
    } else {
      SoftStretch<kStep, false>(job, position, block).run(count);
    }
  });
}

inline void soft(SoftStep step, const Soft& job) {
  switch (step) {
    case SoftStep::kPalettize:
      return soft_step<SoftStep::kPalettize>(job);
    case SoftStep::kPalettizeBackward:
      return soft_step<SoftStep::kPalettizeBackward>(job);
    case SoftStep::kCentroids:
      return soft_step<SoftStep::kCentroids>(job);
    case SoftStep::kCentroidsBackward:
      return soft_step<SoftStep::kCentroidsBackward>(job);
  }
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
