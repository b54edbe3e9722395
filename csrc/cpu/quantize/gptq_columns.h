// gptq_columns: quantizes columns one after another, each less what the errors of those before it ask for.
//
// Rows lie along the lanes. A column is completed just before it is quantized: the errors of a tile of rows stay in the
// first-level cache, and are subtracted in the columns' order, as the reference does.
#pragma once

#include "cpu/quantize/block_params.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

constexpr int kGptqVectors = 4;  // so many sums at a time hide the latency of a subtraction
constexpr int64_t kGptqTile = kGptqVectors * kWidth;

// `n` rows from `row` on, at most a tile.
template <class K>
void gptq_tile(const GptqColumns& job, int64_t row, int64_t n, float* errors, K kind) {
  const auto lanes_of = [n](int v) { return static_cast<int>(max<int64_t>(0, min<int64_t>(kWidth, n - v * kWidth))); };
  for (int64_t column = 0; column < job.columns; ++column) {
    const float* factor = job.factor + column * job.columns;
    F value[kGptqVectors];
    for (int v = 0; v < kGptqVectors; ++v) {
      value[v] = Simd::load_n(job.input + column * job.rows + row + v * kWidth, lanes_of(v));
    }
    for (int64_t before = 0; before < column; ++before) {
      const F share = Simd::set(factor[before]);
      const float* error = errors + before * kGptqTile;
      for (int v = 0; v < kGptqVectors; ++v) {
        value[v] = Simd::sub(value[v], Simd::mul(share, Simd::load(error + v * kWidth)));
      }
    }
    const F pivot = Simd::set(factor[column]);
    for (int v = 0; v < kGptqVectors; ++v) {
      const int lanes = lanes_of(v);
      if (lanes == 0) {
        Simd::store(errors + column * kGptqTile + v * kWidth, Simd::set(0.0f));
        continue;
      }
      const int64_t at = row + v * kWidth;
      const Params<Simd> p = params_of_columns(job.affine, job.groups[column] * job.rows + at, 0, 1, lanes);
      M inside;
      const F q = quantize_lanes<Simd>(value[v], p, inside, kind);
      const F error = Simd::div(Simd::sub(value[v], dequantize_lanes<Simd, K>(q, p)), pivot);
      Simd::store(errors + column * kGptqTile + v * kWidth, error);
      Simd::store_n(job.output + column * job.rows + at, value[v], lanes);
      Simd::store_n(job.errors + column * job.rows + at, error, lanes);
    }
  }
}

void gptq_columns(const GptqColumns& job) {
  with_kind(job.affine.format, job.affine.offset != nullptr, [&](auto kind) {
    const int64_t work = max<int64_t>(1, job.columns * job.columns / 2);  // an element each
    parallel_for(job.rows, kGptqTile, max<int64_t>(kGptqTile, kParallelElements / work), [&](int64_t begin, int64_t end) {
      alignas(64) float errors[GptqColumns::kMaxColumns * kGptqTile];
      for (int64_t row = begin; row < end; row += kGptqTile) {
        gptq_tile(job, row, min(kGptqTile, end - row), errors, kind);
      }
    });
  });
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
