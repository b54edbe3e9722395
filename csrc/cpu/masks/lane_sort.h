// Sorting across vectors: each lane is a list of its own.
#pragma once

#include "common/element.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

// Batcher's odd-even merge sort (Knuth, TAOCP 3, 5.3.4), the largest first. All indices are constants, for the
// vectors to stay in registers.
template <class W>
struct LaneSort {
  using V = typename W::V;
  static constexpr int kLargest = 32;

  // The n-th largest of 1 <= n <= m <= kLargest vectors without negative lanes. Not inline: it is long.
  static __attribute__((noinline)) V nth_largest(const V* values, int n, int m) {
    if (n == 1) return largest_of(values, m);
    if (m <= 8) return of_lists<8, 0>(values, n, m);
    if (m <= 12) return of_lists<8, 4>(values, n, m);
    if (m <= 16) return of_lists<8, 8>(values, n, m);
    if (m <= 20) return of_lists<16, 4>(values, n, m);
    if (m <= 24) return of_lists<16, 8>(values, n, m);
    return of_lists<16, 16>(values, n, m);
  }

 private:
  // Sorts the first kFirst and up to kSecond others. The result is the largest of the least values of leading parts of
  // n, where these are made of the beginnings of both lists.
  template <int kFirst, int kSecond>
  static COREAI_HD V of_lists(const V* values, int n, int m) {
    V first[kFirst];
    sort_of<kFirst>(values, m < kFirst ? m : kFirst, first);
    if constexpr (kSecond == 0) {
      return first[n - 1];
    } else {
      V second[kSecond];
      sort_of<kSecond>(values + kFirst, m - kFirst, second);
      V result = n <= kFirst ? first[n - 1] : W::set(-1);
      if (n <= kSecond) result = largest_of(result, second[n - 1]);
      for (int i = n > kSecond ? n - kSecond : 1; i < n && i <= kFirst; ++i) {
        result = largest_of(result, least_of(first[i - 1], second[n - i - 1]));
      }
      return result;
    }
  }

  static COREAI_HD V largest_of(const V* values, int m) {
    V result = values[0];
    for (int i = 1; i < m; ++i) result = largest_of(result, values[i]);
    return result;
  }
  static COREAI_HD V largest_of(V a, V b) { return a > b ? a : b; }
  static COREAI_HD V least_of(V a, V b) { return a > b ? b : a; }

  template <int kCount>
  static COREAI_HD void sort_of(const V* values, int m, V* sorted) {
    V s[kCount];
    if (m == kCount) {
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) s[i] = values[i];
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) s[i] = i < m ? values[i] : W::set(-1);
    }
    sort<0, kCount>(s);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) sorted[i] = s[i];
  }

  template <int kFirst, int kCount>
  static COREAI_HD void sort(V* s) {
    if constexpr (kCount > 1) {
      sort<kFirst, kCount / 2>(s);
      sort<kFirst + kCount / 2, kCount / 2>(s);
      merge<kFirst, kCount, 1>(s);
    }
  }
  template <int kFirst, int kCount, int kStep>
  static COREAI_HD void merge(V* s) {
    if constexpr (2 * kStep < kCount) {
      merge<kFirst, kCount, 2 * kStep>(s);
      merge<kFirst + kStep, kCount, 2 * kStep>(s);
      neighbours<kFirst + kStep, kFirst + kCount, kStep>(s);
    } else {
      W::exchange(s[kFirst], s[kFirst + kStep]);
    }
  }
  template <int kFirst, int kEnd, int kStep>
  static COREAI_HD void neighbours(V* s) {
    if constexpr (kFirst + kStep < kEnd) {
      W::exchange(s[kFirst], s[kFirst + kStep]);
      neighbours<kFirst + 2 * kStep, kEnd, kStep>(s);
    }
  }
};

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
