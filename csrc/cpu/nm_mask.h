// N:M masks: in every group of m elements, an element is kept if fewer than n rank before it.
//
// Element j ranks before element i if its key is larger, or equal and j < i. With keys lowered by one where j < i,
// that is one comparison. Of large groups the n-th largest key is found by sorting, and ties are then counted.
#pragma once

#include "common/magnitude.h"
#include "cpu/loops.h"
#include "cpu/simd_words.h"

namespace coreai::cpu::COREAI_LEVEL {
namespace {

constexpr int kLargestGroup = 32;
constexpr int kComparedGroup = 5;  // up to this size all pairs are compared

// Batcher's merge exchange for any number of elements (Knuth, TAOCP 3, 5.2.2, algorithm M). The pairs depend on m
// alone.
struct Exchanges {
  int count = 0;
  uint8_t first[192], second[192];

  explicit Exchanges(int m) {
    int top = 1;
    while (2 * top < m) top *= 2;
    for (int p = top; p > 0; p /= 2) {
      int r = 0, d = p;
      for (int q = top;; q /= 2) {
        for (int i = 0; i + d < m; ++i) {
          if ((i & p) == r) first[count] = static_cast<uint8_t>(i), second[count++] = static_cast<uint8_t>(i + d);
        }
        if (q == p) break;
        d = q - p, r = p;
      }
    }
  }
};

template <Element kElement>
struct Groups {
  using Word = WordOf<kElement>;
  using W = Words<sizeof(Word)>;
  using V = typename W::V;
  using Signed = typename W::Word;
  static constexpr int kLanes = W::kLanes;

  static COREAI_HD V keys_of(V bits) {
    const V magnitude = bits & W::set(static_cast<Signed>(static_cast<Word>(~Word{0}) >> 1));
    const V nan = W::set(static_cast<Signed>(kNanKey<kElement>));
    return magnitude < nan ? magnitude : nan;
  }
  static COREAI_HD V mask_of(V rank, int n) {
    const V one = W::set(static_cast<Signed>(Magnitude<kElement>::kOne));
    return W::where(W::greater(W::set(static_cast<Signed>(n)), rank), one);
  }

  // Lane i of the result: the lane that is r after it in its group of kM; and -1 where that one comes before it.
  template <int kM>
  static COREAI_HD V rotated(V keys, int r, V& lowered) {
    V from, result = {};
#pragma GCC unroll 64
    for (int i = 0; i < kLanes; ++i) {
      const int other = i / kM * kM + (i + r) % kM;
      lowered[i] = other < i ? -1 : 0;
      from[i] = static_cast<Signed>(other);
#if defined(__clang__)
      result[i] = keys[other];
#endif
    }
#if !defined(__clang__)
    result = __builtin_shuffle(keys, from);
#endif
    return result;
  }

  // Groups along the lanes, m a power of two: every lane meets the others of its group by rotation.
  template <int kM>
  static COREAI_HD V within(V bits, int n) {
    const V keys = keys_of(bits);
    V rank = {}, lowered = {};
#pragma GCC unroll 32
    for (int r = 1; r < kM; ++r) {
      const V others = rotated<kM>(keys, r, lowered);
      rank -= others > keys + lowered;
    }
    return mask_of(rank, n);
  }

  // Groups across the vectors of an array.
  static COREAI_HD V among(const V* keys, int i, int n, int m) {
    V rank = {};
    const V own = keys[i], lowered = own - 1;
    for (int j = 0; j < i; ++j) rank -= keys[j] > lowered;
    for (int j = i + 1; j < m; ++j) rank -= keys[j] > own;
    return mask_of(rank, n);
  }

  // Replaces the keys of m groups' elements by their mask.
  static COREAI_HD void choose(V* keys, const Exchanges& exchanges, int n, int m) {
    V sorted[kLargestGroup];
    for (int i = 0; i < m; ++i) sorted[i] = keys[i];
    for (int i = 0; i < exchanges.count; ++i) {
      V &high = sorted[exchanges.first[i]], &low = sorted[exchanges.second[i]];
      const V a = high, b = low;
      high = a > b ? a : b;
      low = a > b ? b : a;
    }
    const V threshold = sorted[n - 1], one = W::set(static_cast<Signed>(Magnitude<kElement>::kOne));
    V left = W::set(static_cast<Signed>(n));  // to be kept of those equal to it
    for (int i = 0; i < n; ++i) left += sorted[i] > threshold;
    for (int i = 0; i < m; ++i) {
      const V tie = keys[i] == threshold;
      keys[i] = ((keys[i] > threshold) | (tie & (left > 0))) & one;
      left += tie;
    }
  }

  // Masks of the groups in an array of keys, in their place.
  static COREAI_HD void choose_any(V* keys, const Exchanges& exchanges, int n, int m) {
    if (m > kComparedGroup) return choose(keys, exchanges, n, m);
    V kept[kComparedGroup];
    for (int i = 0; i < m; ++i) kept[i] = among(keys, i, n, m);
    for (int i = 0; i < m; ++i) keys[i] = kept[i];
  }

  template <int kM>
  static void adjacent(const Word* x, Word* mask, int64_t numel, int n) {
    int64_t i = 0;
    for (; i + kLanes <= numel; i += kLanes) W::store(mask + i, within<kM>(W::load(x + i), n));
    if (i < numel) {
      Word buffer[kLanes] = {};
      for (int64_t j = i; j < numel; ++j) buffer[j - i] = x[j];
      W::store(buffer, within<kM>(W::load(buffer), n));
      for (int64_t j = i; j < numel; ++j) mask[j] = buffer[j - i];
    }
  }

  // Groups one after the other, of any size: turned into the lanes and back.
  static void adjacent_any(const Word* x, Word* mask, int64_t groups, int n, int m) {
    const Exchanges exchanges(m);
    V keys[kLargestGroup];
    Word rows[kLargestGroup][kLanes] = {};
    for (int64_t g = 0; g < groups; g += kLanes) {
      const int some = static_cast<int>(smaller<int64_t>(kLanes, groups - g));
      const Word* from = x + g * m;
      Word* to = mask + g * m;
      for (int lane = 0; lane < some; ++lane) {
        for (int i = 0; i < m; ++i) rows[i][lane] = from[lane * m + i];
      }
      for (int i = 0; i < m; ++i) keys[i] = keys_of(W::load(rows[i]));
      choose_any(keys, exchanges, n, m);
      for (int i = 0; i < m; ++i) W::store(rows[i], keys[i]);
      for (int lane = 0; lane < some; ++lane) {
        for (int i = 0; i < m; ++i) to[lane * m + i] = rows[i][lane];
      }
    }
  }

  // Columns [begin, end) of one block of m rows.
  static void columns(const Word* x, Word* mask, int64_t inner, int64_t begin, int64_t end, int n, int m,
                      const Exchanges& exchanges) {
    V keys[kLargestGroup];
    int64_t c = begin;
    for (; c + kLanes <= end; c += kLanes) {
      for (int i = 0; i < m; ++i) keys[i] = keys_of(W::load(x + i * inner + c));
      choose_any(keys, exchanges, n, m);
      for (int i = 0; i < m; ++i) W::store(mask + i * inner + c, keys[i]);
    }
    if (c < end) {
      const uint64_t bytes = static_cast<uint64_t>(end - c) * sizeof(Word);
      for (int i = 0; i < m; ++i) {
        V bits = {};
        __builtin_memcpy(&bits, x + i * inner + c, bytes);
        keys[i] = keys_of(bits);
      }
      choose_any(keys, exchanges, n, m);
      for (int i = 0; i < m; ++i) __builtin_memcpy(mask + i * inner + c, &keys[i], bytes);
    }
  }

  static void adjacent_dispatch(const Word* x, Word* mask, int64_t groups, int n, int m) {
    if (m == 2) return adjacent<2>(x, mask, groups * m, n);
    if constexpr (kLanes >= 4) {
      if (m == 4) return adjacent<4>(x, mask, groups * m, n);
    }
    if constexpr (kLanes >= 8) {
      if (m == 8) return adjacent<8>(x, mask, groups * m, n);
    }
    adjacent_any(x, mask, groups, n, m);
  }

  static void run(const NmMask& job) {
    const Word* x = static_cast<const Word*>(job.input);
    Word* mask = static_cast<Word*>(job.mask);
    const int n = job.n, m = job.m;
    if (job.inner == 1) {
      share(job.blocks, kAlignment, larger<int64_t>(1, kParallelElements / m), [&](int64_t begin, int64_t end) {
        adjacent_dispatch(x + begin * m, mask + begin * m, end - begin, n, m);
      });
      return;
    }
    const Exchanges exchanges(m);
    // A strip of columns whose rows stay in the cache together.
    const int64_t width = smaller<int64_t>(job.inner, 1024), strips = (job.inner + width - 1) / width;
    share(job.blocks * strips, 1, larger<int64_t>(1, kParallelElements / (m * width)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t start = i / strips * m * job.inner, column = i % strips * width;
        columns(x + start, mask + start, job.inner, column, smaller(job.inner, column + width), n, m,
                exchanges);
      }
    });
  }
};

void nm_mask(const NmMask& job) {
  switch (job.element) {
    case Element::kBFloat16:
      return Groups<Element::kBFloat16>::run(job);
    case Element::kFloat16:
      return Groups<Element::kFloat16>::run(job);
    case Element::kFloat64:
      return Groups<Element::kFloat64>::run(job);
    default:
      return Groups<Element::kFloat32>::run(job);
  }
}

}  // namespace
}  // namespace coreai::cpu::COREAI_LEVEL
