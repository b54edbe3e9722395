// Observe, update, choose and fake-quantize. Row-wise blocks go through the cache once.
#pragma once

#include "cpu/quantize/fake_quantize.h"
#include "cpu/quantize/observe_range.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

// Elements handled between the two looks at them: what a first-level cache holds of float32.
constexpr int64_t kCachedElements = 8192;

// The range that the parameters of blocks follow from, after a batch; the running range is written.
template <class = void>
COREAI_HD Range next_range(const Observe& job, Range batch, int64_t block, int n) {
  Range old = batch;
  if (job.update.reads_running()) {
    old = {load_elements(job.running, job.running_low, block, n), load_elements(job.running, job.running_high, block, n)};
  }
  const Range range = update_lanes<Simd>(job.update, job.quantize.element, batch, old);
  if (job.running_low) {
    store_elements(job.running, job.running_low, block, range.low, n);
    store_elements(job.running, job.running_high, block, range.high, n);
  }
  return range;
}

template <class = void>
COREAI_HD void set_qparams(const Observe& job, Range batch, int64_t block, int n) {
  store_qparams(choose_lanes<Simd>(job.rule, next_range(job, batch, block, n)), job.out, block, n);
}

// Parameters of all blocks, whose ranges in this batch are given and become the next ones.
inline void set_all_qparams(const Observe& job, float* low, float* high) {
  const int64_t blocks = job.quantize.geometry->blocks;
  parallel_for(blocks, kWidth, kParallelElements / 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kWidth) {
      const int n = static_cast<int>(min<int64_t>(kWidth, end - i));
      const Range range = next_range(job, {Simd::load_n(low + i, n), Simd::load_n(high + i, n)}, i, n);
      Simd::store_n(low + i, range.low, n);
      Simd::store_n(high + i, range.high, n);
    }
  });
  choose_qparams(job.rule, low, high, blocks, job.out);
}

// Whether no element of the blocks is NaN or beyond 2^62: products with reciprocals of scales stay finite.
template <class = void>
COREAI_HD bool is_in_safe_range(Range range) {
  const F low = clamp_lanes<Simd>(range.low, Simd::set(-0x1p62f), Simd::set(0x1p62f));
  const F high = clamp_lanes<Simd>(range.high, Simd::set(-0x1p62f), Simd::set(0x1p62f));
  const uint32_t same = Simd::bits(Simd::mand(Simd::equal(low, range.low), Simd::equal(high, range.high)));
  return same == static_cast<uint32_t>((uint64_t{1} << kWidth) - 1);
}

template <class = void>
COREAI_HD bool are_in_safe_range(const float* bounds, int64_t n) {
  bool safe = true;
  for (int64_t i = 0; i < n; ++i) safe = safe && bounds[i] >= -0x1p62f && bounds[i] <= 0x1p62f;
  return safe;
}

// Sets the parameters of n neighbouring blocks, and returns whether all is in a safe range. Whatever is quantized to,
// this is the same: one copy for each type of elements.
template <class T>
__attribute__((noinline)) bool observe_blocks(const Observe& job, const T* x, int64_t run, int64_t block, int n) {
  const Range range = range_of_blocks<true>(x, run, n);  // which updating does anyway
  set_qparams(job, range, block, n);
  return is_in_safe_range(range);
}

// Blocks [begin, end); the first element of `begin` is at a multiple of eight.
template <class T, class K, class Bits>
void observe_and_quantize_blocks(const Observe& job, int64_t begin, int64_t end, Bits bits, K kind) {
  const FakeQuantize& quantize = job.quantize;
  const int64_t run = quantize.geometry->run;
  const T* x = static_cast<const T*>(quantize.input);
  T* y = static_cast<T*>(quantize.output);
  BlockParams params;
  const int64_t group = max<int64_t>(1, min<int64_t>(kWidth, kCachedElements / run));
  const auto observe = [&](int64_t i) __attribute__((always_inline)) {
    return observe_blocks(job, x + i * run, run, i, static_cast<int>(min(group, end - i)));
  };
  // One group ahead: what the next group's parameters wait for overlaps with quantizing this one.
  bool finite = begin < end && observe(begin);
  for (int64_t i = begin; i < end; i += group) {
    const int n = static_cast<int>(min(group, end - i));
    params.template load<T>(quantize.affine, i, n, finite, kind);
    finite = i + group < end && observe(i + group);
    fake_quantize_blocks(x + i * run, y + i * run, run, n, params, bits, kind);
  }
  bits.flush();
}

template <class T, class K>
void observe_and_quantize_rows(const Observe& job, K kind) {
  const FakeQuantize& quantize = job.quantize;
  const int64_t run = quantize.geometry->run;
  int64_t unit = 1;  // blocks up to the next byte of the mask
  while (unit * run % 8 != 0) unit *= 2;
  const int64_t grain = max<int64_t>(1, kParallelElements / run);
  parallel_for(quantize.geometry->columns, max<int64_t>(unit, run < kAlignment ? kWidth : 1), grain,
               [&](int64_t begin, int64_t end) {
                 if (quantize.mask) {
                   observe_and_quantize_blocks<T>(job, begin, end, BitWriter(quantize.mask + begin * run / 8), kind);
                 } else {
                   observe_and_quantize_blocks<T>(job, begin, end, NoBits(), kind);
                 }
               });
}

void observe_and_fake_quantize(const Observe& job) {
  const FakeQuantize& quantize = job.quantize;
  const Geometry& g = *quantize.geometry;
  // Few long rows would leave threads idle.
  const bool enough_rows = g.columns >= 2 * threads() || g.numel < kParallelElements;
  // Where the scale of a block depends on all blocks, they have to be observed first.
  const bool each_by_itself = job.rule.scale_format != ScaleFormat::kE4M3;
  if (is_row_wise(g) && enough_rows && each_by_itself) {
    with_type(quantize.element, [&](auto type) {
      using T = typename decltype(type)::type;
      with_kind(quantize.affine.format, quantize.affine.offset != nullptr,
                [&](auto kind) { observe_and_quantize_rows<T>(job, kind); });
    });
    return;
  }
  float* low = new float[static_cast<uint64_t>(2 * g.blocks)];
  float* high = low + g.blocks;
  observe_range({&g, quantize.element, quantize.input, low, high});
  FakeQuantize with_range = quantize;
  with_range.affine.finite = are_in_safe_range(low, 2 * g.blocks);
  set_all_qparams(job, low, high);
  delete[] low;
  fake_quantize_observed(with_range);
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
