// L1 norms of blocks, as the reference defines them: counts of units, whose sums no order of additions changes.
//
// The unit depends on the block's largest magnitude, which is known in the end only. So blocks are added up with a
// unit that is guessed from some of their elements, or from their neighbours, and once more where the guess was wrong:
// one read of the memory mostly, two at most.
#pragma once

#include "cpu/masks/any_norms.h"
#include "cpu/masks/column_norms.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

constexpr int64_t kFirstElements = 1024;  // that a guess is made from

// False if a block is tiny.
template <class T>
bool norms_of_runs(const Bands& g, const T* x, double* norms) {
  int all_fine = 1;
  parallel_for(g.bands * g.columns, 1, max<int64_t>(1, kParallelElements / g.block_elements()),
               [&](int64_t begin, int64_t end) {
                 float scale = 0.0f;
                 bool fine = true;
                 int64_t band = begin / g.columns, column = begin % g.columns;
                 for (int64_t i = begin; i < end; ++i, ++column) {
                   if (column == g.columns) ++band, column = 0;
                   const T* block = x + (band * g.rows * g.columns + column) * g.run;
                   if (i == begin) scale = scale_for(norm_of(block, 1, 0, min(g.run, kFirstElements), 0.0f).peak);
                   Norm norm = norm_of(block, g.rows, g.stride(), g.run, scale);
                   if (scale_for(norm.peak) != scale) {
                     scale = scale_for(norm.peak);
                     norm = norm_of(block, g.rows, g.stride(), g.run, scale);
                   }
                   fine &= !is_tiny(norm.peak);
                   norms[i] = norm.value();
                 }
                 if (!fine) __atomic_store_n(&all_fine, 0, __ATOMIC_RELAXED);
               });
  return all_fine != 0;
}

// False, with nothing of use written, if the blocks are of another kind, or one is tiny.
template <class T>
bool norms_of_bands(const Geometry& g, const T* x, double* norms) {
  Bands bands;
  bands.columns = g.columns, bands.run = g.run;
  if (g.outer_axes > 2) return false;
  // The innermost of the outer axes lies within blocks: those beside each other are columns already.
  if (g.outer_axes > 0) bands.rows = g.outer[g.outer_axes - 1].size;
  if (g.outer_axes > 1) bands.bands = g.outer[0].size;
  return g.run < kShortRun ? norms_of_strips(bands, x, norms) : norms_of_runs(bands, x, norms);
}

void block_norms(const Geometry& g, Element element, const void* x, double* norms) {
  if (element == Element::kFloat64) return any_norms(g, static_cast<const double*>(x), norms);
  with_type(element, [&](auto type) {
    const auto* data = static_cast<const typename decltype(type)::type*>(x);
    if (!norms_of_bands(g, data, norms)) any_norms(g, data, norms);
  });
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
