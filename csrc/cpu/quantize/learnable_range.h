// The gradients of quantization with a learned range. See reference/learnable_range.py.
#pragma once

#include "cpu/loops.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

// Elements summed in float32 lanes before float64 takes over; also the unit in which one block is shared out, so
// that the sums are the same for every number of threads.
constexpr int64_t kSummed = 4096;

struct LearnedRange {
  F low, range, step, level_low, level_high, ratio;
};

struct LearnedTerms {
  F to_input, to_low, to_range;
};

template <class = void>
COREAI_HD LearnedTerms learned_terms(F x, F g, const LearnedRange& p) {
  const F zero = Simd::set(0.0f), one = Simd::set(1.0f);
  const F q = Simd::round(Simd::div(Simd::sub(x, p.low), p.step));
  const F clamped = Simd::min(Simd::max(q, p.level_low), p.level_high);
  const M inside = Simd::equal(clamped, q);
  const F y = Simd::add(Simd::mul(clamped, p.step), p.low);
  const F outside = Simd::select(Simd::equal(clamped, p.level_high), one, p.ratio);
  const F slope = Simd::select(inside, Simd::div(Simd::sub(y, x), p.range), outside);
  return {Simd::mul(g, Simd::select(inside, one, zero)), Simd::select(inside, zero, g), Simd::mul(g, slope)};
}

COREAI_HD double sum_of_lanes(F values) {
  float lanes[kWidth];
  Simd::store(lanes, values);
  double sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += lanes[i];
  return sum;
}

template <class = void>
COREAI_HD LearnedRange learned_range(const LearnableRange& job, F low, F range) {
  const F high = Simd::set(job.level_high);
  return {low, range, Simd::div(range, high), Simd::set(job.level_low), high, Simd::set(job.level_low / job.level_high)};
}

template <class = void>
COREAI_HD LearnedRange learned_range_of(const LearnableRange& job, int64_t block) {
  return learned_range(job, Simd::set(job.low ? job.low[block] : 0.0f), Simd::set(job.range[block]));
}

// Neighbours that share their block.
template <class T>
COREAI_HD void learned_run(const LearnableRange& job, int64_t at, int64_t n, const LearnedRange& p, double* sums) {
  const T* x = static_cast<const T*>(job.input);
  const T* g = static_cast<const T*>(job.grad);
  T* out = static_cast<T*>(job.output);
  while (n > 0) {
    const int64_t some = min(n, kSummed);
    F to_low = Simd::set(0.0f), to_range = Simd::set(0.0f);
    int64_t i = 0;
    for (; i + kWidth <= some; i += kWidth) {
      const LearnedTerms t = learned_terms(Simd::load(x + at + i), Simd::load(g + at + i), p);
      Simd::store(out + at + i, t.to_input);
      to_low = Simd::add(to_low, t.to_low);
      to_range = Simd::add(to_range, t.to_range);
    }
    if (i < some) {
      const int rest = static_cast<int>(some - i);
      // A gradient of zero adds zero, whatever the lanes beyond the end hold.
      const LearnedTerms t = learned_terms(Simd::load_n(x + at + i, rest), Simd::load_n(g + at + i, rest), p);
      Simd::store_n(out + at + i, t.to_input, rest);
      const M valid = Simd::first(rest);
      to_low = Simd::add(to_low, Simd::select(valid, t.to_low, Simd::set(0.0f)));
      to_range = Simd::add(to_range, Simd::select(valid, t.to_range, Simd::set(0.0f)));
    }
    sums[0] += sum_of_lanes(to_low);
    sums[1] += sum_of_lanes(to_range);
    at += some;
    n -= some;
  }
}

// Neighbours that lie in neighbouring blocks: one block a lane.
template <class T>
COREAI_HD void learned_lanes(const LearnableRange& job, int64_t at, int64_t block, int n) {
  const F low = job.low ? Simd::load_n(job.low + block, n) : Simd::set(0.0f);
  // Lanes beyond the end divide by one rather than by zero.
  const F range = Simd::select(Simd::first(n), Simd::load_n(job.range + block, n), Simd::set(1.0f));
  const LearnedTerms t =
      learned_terms(Simd::load_n(static_cast<const T*>(job.input) + at, n),
                    Simd::load_n(static_cast<const T*>(job.grad) + at, n), learned_range(job, low, range));
  Simd::store_n(static_cast<T*>(job.output) + at, t.to_input, n);
  float to_low[kWidth], to_range[kWidth];
  Simd::store(to_low, t.to_low);
  Simd::store(to_range, t.to_range);
  for (int i = 0; i < n; ++i) {
    job.sums[2 * (block + i)] += to_low[i];
    job.sums[2 * (block + i) + 1] += to_range[i];
  }
}

// All rows of the columns [begin, end): a block belongs to one caller.
template <class T>
void learned_columns(const LearnableRange& job, int64_t begin, int64_t end) {
  const Geometry& g = *job.geometry;
  const int64_t length = row_length(g), rows = g.numel / length;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t base = row_base(g, row);
    if (g.run > 1) {
      for (int64_t column = begin; column < end; ++column) {
        const int64_t block = base + column;
        learned_run<T>(job, row * length + column * g.run, g.run, learned_range_of(job, block), job.sums + 2 * block);
      }
      continue;
    }
    for (int64_t column = begin; column < end; column += kWidth) {
      const int n = static_cast<int>(min<int64_t>(kWidth, end - column));
      learned_lanes<T>(job, row * length + column, base + column, n);
    }
  }
}

void learnable_range(const LearnableRange& job) {
  with_type(job.element, [&](auto type) {
    using T = typename decltype(type)::type;
    const Geometry& g = *job.geometry;
    if (g.blocks == 1) {
      const LearnedRange p = learned_range_of(job, 0);
      parallel_for(g.numel, kSummed, kParallelElements, [&](int64_t begin, int64_t end) {
        for (; begin < end; begin += kSummed) {
          learned_run<T>(job, begin, min(kSummed, end - begin), p, job.sums + 2 * (begin / kSummed));
        }
      });
      return;
    }
    const int64_t per_column = g.numel / g.columns;
    parallel_for(g.columns, kWidth, max<int64_t>(kWidth, kParallelElements / per_column),
                 [&](int64_t begin, int64_t end) { learned_columns<T>(job, begin, end); });
  });
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
