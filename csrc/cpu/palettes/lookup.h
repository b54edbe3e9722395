// lookup: words from a table by indices that are bytes or packed bits; and sums by index, its gradient.
#pragma once

#include "cpu/bits.h"
#include "cpu/simd_table.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

// Packed indices are unpacked so many at a time: a multiple of 8, for whole bytes.
constexpr int64_t kUnpacked = 2048;

template <class Kind>
inline void look_up(const uint8_t* indices, int64_t count, const uint32_t* words, uint32_t* out) {
  int64_t i = 0;
  if constexpr (FloatTable<Kind::value>::kIsQuick) {
    const FloatTable<Kind::value> entries(reinterpret_cast<const float*>(words));
    auto* floats = reinterpret_cast<float*>(out);
    for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
      for (int j = 0; j < 4 * kWidth; j += kWidth) {
        Simd::store(floats + i + j, entries.at(Simd::load_bytes(indices + i + j)));
      }
    }
    for (; i + kWidth <= count; i += kWidth) Simd::store(floats + i, entries.at(Simd::load_bytes(indices + i)));
  }
  for (; i < count; ++i) out[i] = words[indices[i] & (Kind::kRoom - 1)];
}

template <class Kind>
inline void look_up(const uint8_t* indices, int64_t count, const uint16_t* words, uint16_t* out) {
  const WordTable<Kind::value> entries(words);
  constexpr int kLanes = WordTable<Kind::value>::kLanes;
  int64_t i = 0;
  if constexpr (kLanes > 0) {
    for (; i + kLanes <= count; i += kLanes) entries.look_up(indices + i, out + i);
  }
  for (; i < count; ++i) out[i] = words[indices[i] & (Kind::kRoom - 1)];
}

template <class Kind>
inline void look_up(const uint8_t* indices, int64_t count, const uint64_t* words, uint64_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = words[indices[i] & (Kind::kRoom - 1)];
}

// `count` indices from byte `packed` on. One copy for all kinds of tables.
template <class = void>
__attribute__((noinline)) void unpack(const uint8_t* packed, int64_t count, int bits, uint8_t* out) {
  const int64_t bytes = count * bits / 8;
  if (bits == 4) {
    for (int64_t i = 0; i < bytes; ++i) {
      out[2 * i] = packed[i] & 15;
      out[2 * i + 1] = packed[i] >> 4;
    }
    if (count % 2 != 0) out[count - 1] = packed[bytes] & 15;
  } else if (bits == 2 && count % 4 == 0) {
    for (int64_t i = 0; i < bytes; ++i) {
      for (int j = 0; j < 4; ++j) out[4 * i + j] = packed[i] >> 2 * j & 3;
    }
  } else {
    unpack_some(packed, count, bits, out);
  }
}

// Zeros, of the same sign, where nothing is kept.
template <class Word>
inline void keep(const uint8_t* kept, int64_t count, Word* out) {
  constexpr auto kSign = static_cast<Word>(Word{1} << (8 * sizeof(Word) - 1));
  for (int64_t i = 0; i < count; ++i) out[i] &= kept[i] != 0 ? static_cast<Word>(-1) : kSign;
}

template <class Kind, class Word>
void lookup_words(const Lookup& job, int64_t begin, int64_t end) {
  const PaletteLayout& layout = job.layout;
  const auto* tables = static_cast<const Word*>(job.tables);
  auto* output = static_cast<Word*>(job.output);
  uint8_t buffer[kUnpacked];
  // What is masked is still in the cache.
  const int64_t step = job.bits == 8 && job.kept == nullptr ? end - begin : kUnpacked;
  for (int64_t start = begin; start < end; start += step) {
    const int64_t stop = min(start + step, end);
    const uint8_t* indices = job.indices + start;
    if (job.bits != 8) {
      unpack(job.indices + start * job.bits / 8, stop - start, job.bits, buffer);
      indices = buffer;
    }
    over_stretches(layout, start, stop, [&](int64_t position, int64_t count, int64_t block) {
      Word* out = output + entry_of(layout, position);
      for (int64_t entry = 0; entry < layout.dim; ++entry) {
        look_up<Kind>(indices + (position - start), count, tables + (block * layout.dim + entry) * Kind::kRoom,
                      out + entry * layout.row);
      }
    });
    if (job.kept != nullptr) keep(job.kept + start, stop - start, output + start);
  }
}

inline void lookup(const Lookup& job) {
  with_table_kind(job.kind, [&](auto kind) {
    using Kind = decltype(kind);
    parallel_for(job.layout.geometry->numel, kUnpacked, kParallelElements, [&](int64_t begin, int64_t end) {
      if (job.element_size == 2) {
        lookup_words<Kind, uint16_t>(job, begin, end);
      } else if (job.element_size == 4) {
        lookup_words<Kind, uint32_t>(job, begin, end);
      } else {
        lookup_words<Kind, uint64_t>(job, begin, end);
      }
    });
  });
}

// Four sums for each index, so that equal neighbours do not wait for one another.
constexpr int kSums = 4;

template <class T>
void sum_stretch(const T* grad, const uint8_t* indices, int64_t count, int64_t clusters, double* sums, int64_t stride) {
  constexpr int64_t kChunk = 16 * kWidth;
  double own[kSums][256];
  for (auto& part : own) {
    for (int64_t j = 0; j < clusters; ++j) part[j] = 0;
  }
  float values[kChunk];
  for (int64_t start = 0; start < count; start += kChunk) {
    const int64_t size = min(kChunk, count - start);
    int64_t i = 0;
    for (; i + kWidth <= size; i += kWidth) Simd::store(values + i, Simd::load(grad + start + i));
    if (i < size) Simd::store(values + i, Simd::load_n(grad + start + i, static_cast<int>(size - i)));
    for (i = 0; i < size; ++i) own[i % kSums][indices[start + i]] += values[i];
  }
  for (int64_t j = 0; j < clusters; ++j) {
    sums[j * stride] += (own[0][j] + own[1][j]) + (own[2][j] + own[3][j]);
  }
}

// A few elements.
template <class T>
void sum_briefly(const T* grad, const uint8_t* indices, int64_t count, int64_t clusters, double* sums, int64_t stride) {
  for (int64_t start = 0; start < count; start += kWidth) {
    const int size = static_cast<int>(min<int64_t>(kWidth, count - start));
    float values[kWidth];
    Simd::store(values, Simd::load_n(grad + start, size));
    for (int i = 0; i < size; ++i) {
      if (indices[start + i] < clusters) sums[indices[start + i] * stride] += values[i];
    }
  }
}

inline void sum_by_index(const SumByIndex& job) {
  const PaletteLayout& layout = job.layout;
  with_type(job.element, [&](auto type) {
    using T = typename decltype(type)::type;
    over_stretches(layout, job.first, job.last, [&](int64_t position, int64_t count, int64_t block) {
      const uint8_t* indices = job.indices + position;
      for (int64_t entry = 0; entry < layout.dim; ++entry) {
        const T* grad = static_cast<const T*>(job.grad) + entry_of(layout, position) + entry * layout.row;
        double* sums = job.sums + block * job.clusters * layout.dim + entry;
        if (count < 8 * job.clusters) {
          sum_briefly(grad, indices, count, job.clusters, sums, layout.dim);
        } else {
          sum_stretch(grad, indices, count, job.clusters, sums, layout.dim);
        }
      }
    });
  });
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
