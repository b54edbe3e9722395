// palettize: the index of the nearest centroid.
#pragma once

#include "cpu/simd_table.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

// Lanes of `yes` where x exceeds the bound; NaN exceeds none.
COREAI_HD I step_up(F x, F bound, I position, int step) {
  const M stays = Simd::equal(Simd::max(x, bound), bound);
  const I next = Simd::iadd(position, Simd::iset(step));
  return Simd::as_int(Simd::select(stays, Simd::as_float(position), Simd::as_float(next)));
}

// The number of bounds that x exceeds, by halving.
template <class Kind>
class Search {
 public:
  Search(const float* bounds, const int32_t* order)
      : bounds_(bounds), order_(reinterpret_cast<const float*>(order)), middle_(Simd::set(bounds[15])) {
    if constexpr (Kind::value == TableKind::k256) {
      for (int i = 0; i < 16; ++i) tops_[i] = i < 15 ? bounds[16 * i + 15] : __builtin_inff();
    }
  }
  COREAI_HD I operator()(F x) const {
    I position = Simd::iset(0);
    if constexpr (Kind::value == TableKind::k256) {
      const FloatTable<TableKind::k16> tops(tops_);
      for (int step = 8; step > 0; step /= 2) {
        position = step_up(x, tops.at(Simd::iadd(position, Simd::iset(step - 1))), position, step);
      }
      position = Simd::template shl<4>(position);
    } else if constexpr (Kind::value == TableKind::k32) {
      position = step_up(x, middle_, position, 16);
    }
    for (int step = 8; step > 0; step /= 2) {
      position = step_up(x, bounds_.at(Simd::iadd(position, Simd::iset(step - 1))), position, step);
    }
    return Simd::as_int(order_.at(position));
  }

 private:
  FloatTable<Kind::value> bounds_, order_;
  F middle_;
  float tops_[16];
};

template <class Kind, class T>
inline void nearest_scalars(const T* x, int64_t count, const float* bounds, const int32_t* order, uint8_t* out) {
  const Search<Kind> search(bounds, order);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) Simd::store_bytes(out + i, search(Simd::load(x + i)));
  if (i == count) return;
  uint8_t tail[kWidth];
  Simd::store_bytes(tail, search(Simd::load_n(x + i, static_cast<int>(count - i))));
  for (int64_t j = 0; i + j < count; ++j) out[i + j] = tail[j];
}

// Squared distances are summed from the first entry on; the first least one wins, and NaN is never less.
template <class T>
COREAI_HD I nearest_of(const T* x, int lanes, int64_t dim, int64_t row, const float* table, int64_t clusters) {
  constexpr int kTileEntries = 8;
  F register_tile[kTileEntries];
  const int64_t in_registers = min<int64_t>(dim, kTileEntries);
  for (int64_t entry = 0; entry < in_registers; ++entry) register_tile[entry] = load_lanes(x + entry * row, lanes);
  F least = Simd::set(__builtin_inff());
  I chosen = Simd::iset(0);
  for (int64_t j = 0; j < clusters; ++j, table += dim) {
    F distance = Simd::set(0.0f);
    for (int64_t entry = 0; entry < dim; ++entry) {
      const F value = entry < kTileEntries ? register_tile[entry] : load_lanes(x + entry * row, lanes);
      const F difference = Simd::sub(value, Simd::set(table[entry]));
      distance = Simd::add(distance, Simd::mul(difference, difference));
    }
    const F less = Simd::min(distance, least);
    const M same = Simd::equal(less, least);
    chosen = Simd::as_int(Simd::select(same, Simd::as_float(chosen), Simd::as_float(Simd::iset(static_cast<int32_t>(j)))));
    least = less;
  }
  return chosen;
}

template <class T>
inline void nearest_vectors(const T* x, int64_t count, const PaletteLayout& layout, const float* table, int64_t clusters,
                            uint8_t* out) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const int lanes = static_cast<int>(min<int64_t>(kWidth, count - i));
    I chosen;
    switch (layout.dim) {  // known lengths keep the entries in registers
      case 2:
        chosen = nearest_of(x + i, lanes, 2, layout.row, table, clusters);
        break;
      case 4:
        chosen = nearest_of(x + i, lanes, 4, layout.row, table, clusters);
        break;
      default:
        chosen = nearest_of(x + i, lanes, layout.dim, layout.row, table, clusters);
    }
    uint8_t codes[kWidth];
    Simd::store_bytes(codes, chosen);
    for (int j = 0; j < lanes; ++j) out[i + j] = codes[j];
  }
}

inline void palettize(const Palettize& job) {
  const PaletteLayout& layout = job.layout;
  with_type(job.element, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto* weight = static_cast<const T*>(job.weight);
    if (layout.dim > 1) {
      const int64_t grain = max<int64_t>(kAlignment, 4 * kParallelElements / (layout.dim * job.clusters));
      parallel_for(layout.geometry->numel, kAlignment, grain, [&](int64_t begin, int64_t end) {
        over_stretches(layout, begin, end, [&](int64_t position, int64_t count, int64_t block) {
          nearest_vectors(weight + entry_of(layout, position), count, layout, job.table + block * job.clusters * layout.dim,
                          job.clusters, job.indices + position);
        });
      });
      return;
    }
    with_table_kind(table_kind(job.clusters), [&](auto kind) {
      using Kind = decltype(kind);
      parallel_for(layout.geometry->numel, kAlignment, kParallelElements, [&](int64_t begin, int64_t end) {
        over_stretches(layout, begin, end, [&](int64_t position, int64_t count, int64_t block) {
          nearest_scalars<Kind>(weight + position, count, job.table + block * Kind::kRoom, job.order + block * Kind::kRoom,
                                job.indices + position);
        });
      });
    });
  });
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
