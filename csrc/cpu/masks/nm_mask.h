// N:M masks: in every group of m elements, an element is kept if fewer than n rank before it.
//
// Element j ranks before element i if its key is larger, or equal and j < i. With keys lowered by one where j < i,
// that is one comparison. Of large groups the n-th largest key is found by sorting, and ties are then counted; there
// every lane has a group of its own, for which groups along the memory are turned into the lanes: the usual sizes a few
// vectors at a time, which leaves the memory to the processor's prefetching, others a matrix at a time.
#pragma once

#include "common/magnitude.h"
#include "cpu/loops.h"
#include "cpu/masks/group_lanes.h"
#include "cpu/masks/lane_sort.h"
#include "cpu/simd_words.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

// Keys and masks of words of one size. The two 16-bit types share the code: what differs is two numbers.
template <class Word_>
struct Groups {
  using Word = Word_;
  using W = Words<sizeof(Word)>;
  using V = typename W::V;
  using Signed = typename W::Word;
  static constexpr int kLanes = W::kLanes, kLargestGroup = LaneSort<W>::kLargest;

  // Loops use copies, which their stores cannot change.
  Word nan_key, one;

  template <Element kElement>
  static COREAI_HD Groups of() {
    return {kNanKey<kElement>, Magnitude<kElement>::kOne};
  }

  // A constant where the size of words tells the type.
  COREAI_HD Groups known() const {
    if constexpr (sizeof(Word) == 4) return of<Element::kFloat32>();
    if constexpr (sizeof(Word) == 8) return of<Element::kFloat64>();
    return *this;
  }
  COREAI_HD V keys_of(V bits) const {
    const V magnitude = bits & W::set(static_cast<Signed>(static_cast<Word>(~Word{0}) >> 1));
    const V nan = W::set(static_cast<Signed>(known().nan_key));
    return magnitude < nan ? magnitude : nan;
  }
  COREAI_HD V ones(typename W::M kept) const { return W::where(kept, W::set(static_cast<Signed>(known().one))); }

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
  COREAI_HD V within(V bits, int n) const {
    const V keys = keys_of(bits);
    V rank = {}, lowered = {};
#pragma GCC unroll 32
    for (int r = 1; r < kM; ++r) {
      const V others = rotated<kM>(keys, r, lowered);
      rank -= others > keys + lowered;
    }
    return ones(W::greater(W::set(static_cast<Signed>(n)), rank));
  }

  // Groups across the vectors of an array, a lane each. Calls put(i, which of the i-th elements are kept), and has no
  // use for keys[i] any more.
  template <class Put>
  static COREAI_HD void choose(const V* keys, int n, int m, Put put) {
    switch (m) {
      case 2:
        return compare_all<2>(keys, n, put);
      case 3:
        return compare_all<3>(keys, n, put);
      case 4:
        return compare_all<4>(keys, n, put);
      case 5:
        return compare_all<5>(keys, n, put);
      case 6:
        return compare_all<6>(keys, n, put);
      default:
        return sort_all(keys, n, m, put);
    }
  }
  // Every key becomes what the mask holds in its place. For few groups: a copy of `choose` takes long to compile.
  static __attribute__((noinline)) void replace(Groups own, V* keys, int n, int m) {
    choose(keys, n, m, [&](int i, typename W::M kept) { keys[i] = own.ones(kept); });
  }
  template <class Put>
  static COREAI_HD void sort_all(const V* keys, int n, int m, Put put) {
    const V threshold = LaneSort<W>::nth_largest(keys, n, m), below = threshold - 1;
    const V all = W::set(static_cast<Signed>(n));
    if constexpr (sizeof(Word) > 2) {  // 16-bit keys tie all the time
      const V left = less_those_above(all, keys, below, m);
      if (W::bits(W::greater(V{}, left)) == 0) {
        for (int i = 0; i < m; ++i) put(i, W::greater(keys[i], below));
        return;
      }
    }
    // All above the threshold; and as long as some are left to be kept, those equal to it.
    V left = less_those_above(all, keys, threshold, m);
    for (int i = 0; i < m; ++i) {
      const auto is_tie = W::equal(keys[i], threshold);
      put(i, W::greater(keys[i], threshold - W::min(left, W::set(1))));
      left = W::less_one_down_to_zero(left, is_tie);
    }
  }
  // Two sums, not to wait for each addition.
  static COREAI_HD V less_those_above(V count, const V* keys, V bound, int m) {
    V other = {};
    int i = 0;
    for (; i + 1 < m; i += 2) {
      count = W::less_one(count, W::greater(keys[i], bound));
      other = W::less_one(other, W::greater(keys[i + 1], bound));
    }
    return i < m ? W::less_one(count, W::greater(keys[i], bound)) + other : count + other;
  }
  template <int kM, class Put>
  static COREAI_HD void compare_all(const V* keys, int n, Put put) {
    // How many may still rank before each: at first those before it in memory do.
    V own[kM], left[kM];
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i) own[i] = keys[i], left[i] = W::set(static_cast<Signed>(n - i));
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 8
      for (int j = i + 1; j < kM; ++j) {
        const auto is_later_first = W::greater(own[j], own[i]);
        left[i] = W::less_one(left[i], is_later_first), left[j] = W::plus_one(left[j], is_later_first);
      }
      put(i, W::greater(left[i], V{}));
    }
  }

  template <int kM>
  static void adjacent(Groups own, const Word* x, Word* mask, int64_t numel, int n) {
    int64_t i = 0;
    for (; i + kLanes <= numel; i += kLanes) W::store(mask + i, own.template within<kM>(W::load(x + i), n));
    if (i < numel) {
      Word buffer[kLanes] = {};
      for (int64_t j = i; j < numel; ++j) buffer[j - i] = x[j];
      W::store(buffer, own.template within<kM>(W::load(buffer), n));
      for (int64_t j = i; j < numel; ++j) mask[j] = buffer[j - i];
    }
  }

  // Groups one after the other, as many vectors at a time as a group has elements.
  template <int kM>
  void adjacent_vectors(const Word* x, Word* mask, int64_t groups, int n) const {
    const Groups own = *this;
    using Lanes = GroupLanes<W, kM>;
    for (; groups >= kLanes; groups -= kLanes, x += kM * kLanes, mask += kM * kLanes) {
      V v[kM];
#pragma GCC unroll 32
      for (int i = 0; i < kM; ++i) v[i] = own.keys_of(W::load(x + i * kLanes));
      Lanes::turn(v);
      choose(v, n, kM, [&](int i, typename W::M kept) { v[i] = own.ones(kept); });
      Lanes::turn_back(v);
#pragma GCC unroll 32
      for (int i = 0; i < kM; ++i) W::store(mask + i * kLanes, v[i]);
    }
    few(x, mask, groups, n, kM);
  }

  // Groups one after the other, of any size: lanes take stretches of so many groups that they nearly fill vectors.
  void adjacent_any(const Word* x, Word* mask, int64_t groups, int n, int m) const {
    const Groups own = *this;
    constexpr int kBits = kLanes < 16 ? kLanes : 16;  // positions whose bits fill a word
    const int stretch = m * groups_that_fill_vectors(m), padded = padded_to_vectors(stretch);
    const int64_t tile = int64_t{stretch} * kLanes;
    int64_t numel = groups * m;
    V keys[kLongestStretch], bit[kBits];
    for (int i = 0; i < kBits; ++i) bit[i] = W::set(static_cast<Signed>(1 << i));
    // What is read and written past a stretch belongs to the next one, which is read before and written later. Not so
    // past the last: the input may be the output.
    for (; numel >= tile + padded - stretch; numel -= tile, x += tile, mask += tile) {
      for (int from = 0; from < padded; from += kLanes) {
        Transpose<W>::of(keys + from, [&](int i) { return own.keys_of(W::load(x + i * stretch + from)); });
        for (int i = 0; i < kLanes; ++i) {
          __builtin_prefetch(x + tile + (from + i) * kLanes);
          __builtin_prefetch(mask + (from + i) * kLanes, 1);
        }
      }
      for (int from = 0; from < stretch; from += m) {
        choose(keys + from, n, m,
               [&](int i, typename W::M each) { keys[from + i] = W::where(each, bit[(from + i) & (kBits - 1)]); });
      }
      for (int i = stretch; i < padded; ++i) keys[i] = V{};
      Word words[kLongestStretch / kBits][kLanes];
      for (int from = 0; from < padded; from += kBits) {
        V all = {};
#pragma GCC unroll 16
        for (int i = 0; i < kBits; ++i) all |= keys[from + i];
        W::store(words[from / kBits], all);
      }
      for (int i = 0; i < kLanes; ++i) {
        for (int from = 0; from < padded; from += kLanes) {
          const auto* word = words + from / kBits;
          uint32_t bits = static_cast<uint32_t>(word[0][i]);
          if constexpr (kLanes > kBits) bits |= static_cast<uint32_t>(word[1][i]) << kBits;
          const V result = own.ones(W::from_bits(bits));
          Word* to = mask + i * stretch + from;
          if (i < kLanes - 1 || from + kLanes <= stretch) {
            W::store(to, result);
          } else {
            __builtin_memcpy(to, &result, static_cast<uint64_t>(stretch - from) * sizeof(Word));
          }
        }
      }
    }
    few(x, mask, numel / m, n, m);
  }

  static constexpr int kLongestStretch = 128;
  static int padded_to_vectors(int length) { return (length + kLanes - 1) / kLanes * kLanes; }
  static int groups_that_fill_vectors(int m) {
    int best = 1;
    for (int i = 2; padded_to_vectors(i * m) <= kLongestStretch; ++i) {
      if (padded_to_vectors(i * m) * best < padded_to_vectors(best * m) * i) best = i;
    }
    return best;
  }

  // The same, one element after the other.
  void few(const Word* x, Word* mask, int64_t groups, int n, int m) const {
    V keys[kLargestGroup];
    Word rows[kLargestGroup][kLanes] = {};
    for (int64_t g = 0; g < groups; g += kLanes) {
      const int some = static_cast<int>(min<int64_t>(kLanes, groups - g));
      const Word* from = x + g * m;
      Word* to = mask + g * m;
      for (int lane = 0; lane < some; ++lane) {
        for (int i = 0; i < m; ++i) rows[i][lane] = from[lane * m + i];
      }
      for (int i = 0; i < m; ++i) keys[i] = keys_of(W::load(rows[i]));
      replace(*this, keys, n, m);
      for (int i = 0; i < m; ++i) W::store(rows[i], keys[i]);
      for (int lane = 0; lane < some; ++lane) {
        for (int i = 0; i < m; ++i) to[lane * m + i] = rows[i][lane];
      }
    }
  }

  // Columns [begin, end) of one block of m rows.
  void columns(const Word* x, Word* mask, int64_t inner, int64_t begin, int64_t end, int n, int m) const {
    const Groups own = *this;
    V keys[kLargestGroup];
    int64_t c = begin;
    for (; c + kLanes <= end; c += kLanes) {
      for (int i = 0; i < m; ++i) keys[i] = own.keys_of(W::load(x + i * inner + c));
      choose(keys, n, m, [&](int i, typename W::M kept) { W::store(mask + i * inner + c, own.ones(kept)); });
    }
    if (c < end) {
      const uint64_t bytes = static_cast<uint64_t>(end - c) * sizeof(Word);
      for (int i = 0; i < m; ++i) {
        V bits = {};
        __builtin_memcpy(&bits, x + i * inner + c, bytes);
        keys[i] = own.keys_of(bits);
      }
      replace(own, keys, n, m);
      for (int i = 0; i < m; ++i) __builtin_memcpy(mask + i * inner + c, &keys[i], bytes);
    }
  }

  void adjacent_dispatch(const Word* x, Word* mask, int64_t groups, int n, int m) const {
    if (m == 2) return adjacent<2>(*this, x, mask, groups * m, n);
    if constexpr (kLanes >= 4) {
      if (m == 4) return adjacent<4>(*this, x, mask, groups * m, n);
    }
    if constexpr (kLanes >= 8) {
      if (m == 8) return adjacent<8>(*this, x, mask, groups * m, n);
    }
    if constexpr (GroupLanes<W, 6>::kPossible) {
      if (m == 6) return adjacent_vectors<6>(x, mask, groups, n);
    }
    if constexpr (GroupLanes<W, 12>::kPossible) {
      if (m == 12) return adjacent_vectors<12>(x, mask, groups, n);
    }
    if constexpr (GroupLanes<W, 16>::kPossible) {
      if (m == 16) return adjacent_vectors<16>(x, mask, groups, n);
    }
    adjacent_any(x, mask, groups, n, m);
  }

  void run(const NmMask& job) const {
    const Word* x = static_cast<const Word*>(job.input);
    Word* mask = static_cast<Word*>(job.mask);
    const int n = job.n, m = job.m;
    if (job.inner == 1) {
      parallel_for(job.blocks, kAlignment, max<int64_t>(1, kParallelElements / m), [&](int64_t begin, int64_t end) {
        adjacent_dispatch(x + begin * m, mask + begin * m, end - begin, n, m);
      });
      return;
    }
    // A strip of columns whose rows stay in the cache together.
    const int64_t width = min<int64_t>(job.inner, 1024), strips = (job.inner + width - 1) / width;
    parallel_for(job.blocks * strips, 1, max<int64_t>(1, kParallelElements / (m * width)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t start = i / strips * m * job.inner, column = i % strips * width;
        columns(x + start, mask + start, job.inner, column, min(job.inner, column + width), n, m);
      }
    });
  }
};

void nm_mask(const NmMask& job) {
  switch (job.element) {
    case Element::kBFloat16:
      return Groups<uint16_t>::of<Element::kBFloat16>().run(job);
    case Element::kFloat16:
      return Groups<uint16_t>::of<Element::kFloat16>().run(job);
    case Element::kFloat64:
      return Groups<uint64_t>::of<Element::kFloat64>().run(job);
    default:
      return Groups<uint32_t>::of<Element::kFloat32>().run(job);
  }
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
