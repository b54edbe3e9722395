// Groups of kM neighbouring words, turned into the lanes of kM vectors: a lane a group, a vector a place in the group.
//
// A group is kUnits units, an odd number, of kUnit words, a power of two. In kUnits vectors one after the other every
// lane meets each place once, so that blends alone collect the units of a place, and one rotation aligns them with the
// first of their groups. The words of units are turned as those of any square matrix.
#pragma once

#include "cpu/transpose.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

template <class W, int kM>
struct GroupLanes {
  using V = typename W::V;
  static constexpr int kUnit = kM & -kM, kUnits = kM / kUnit;
  static constexpr int kPlaces = W::kLanes / kUnit;  // units of a vector
  static constexpr bool kPossible = kPlaces > 0 && kUnits <= 3;

  // Of kM vectors in memory order the i-th becomes the i-th words of all groups.
  static COREAI_HD void turn(V* v) {
#pragma GCC unroll 16
    for (int i = 0; i < kUnit; ++i) collect<false>(v + i * kUnits);
    V turned[kM];
#pragma GCC unroll 4
    for (int i = 0; i < kUnits; ++i) {
      Transpose<W>::template of<kUnit>(turned + i * kUnit, [&](int j) { return v[j * kUnits + i]; });
    }
#pragma GCC unroll 64
    for (int i = 0; i < kM; ++i) v[i] = turned[i];
  }

  static COREAI_HD void turn_back(V* v) {
    V turned[kM], rows[kUnit];
#pragma GCC unroll 4
    for (int i = 0; i < kUnits; ++i) {
      Transpose<W>::template of<kUnit>(rows, [&](int j) { return v[i * kUnit + j]; });
#pragma GCC unroll 16
      for (int j = 0; j < kUnit; ++j) turned[j * kUnits + i] = rows[j];
    }
#pragma GCC unroll 16
    for (int i = 0; i < kUnit; ++i) collect<true>(turned + i * kUnits);
#pragma GCC unroll 64
    for (int i = 0; i < kM; ++i) v[i] = turned[i];
  }

 private:
  // Units as the widest words that move as one.
  static constexpr int kUnitBytes = kUnit * static_cast<int>(sizeof(typename W::Word));
  static constexpr int kBytes = kUnitBytes < 8 ? kUnitBytes : 8, kPieces = kUnitBytes / kBytes;
  static constexpr int kCount = kVectorBytes / kBytes;
  using U = typename Words<kBytes>::V;

  template <bool kBack>
  static COREAI_HD void collect(V* v) {
    if constexpr (kUnits > 1) {
      U from[kUnits];
      each<kUnits>([&]<int kI>() { from[kI] = rotated<kBack ? -kI : 0>((U)v[kI]); });
      each<kUnits>([&]<int kI>() {
        U all = from[0];
        each<kUnits>([&]<int kFrom>() { all = blended<kBack ? kI : kFrom, kBack ? kFrom : kI>(all, from[kFrom]); });
        v[kI] = (V)rotated<kBack ? 0 : kI>(all);
      });
    }
  }

  template <int kEnd, int kI = 0, class Body>
  static COREAI_HD void each(Body body) {
    if constexpr (kI < kEnd) {
      body.template operator()<kI>();
      each<kEnd, kI + 1>(body);
    }
  }

  // Every unit is taken from as many lanes further on.
  template <int kBy>
  static COREAI_HD U rotated(U a) {
    if constexpr (kBy % kPlaces == 0) return a;
    U result = a, from;
#pragma GCC unroll 64
    for (int i = 0; i < kCount; ++i) {
      from[i] = (i + kBy * kPieces + kCount) % kCount;
#if defined(__clang__)
      result[i] = a[(i + kBy * kPieces + kCount) % kCount];
#endif
    }
#if !defined(__clang__)
    result = __builtin_shuffle(a, from);
#endif
    return result;
  }

  // The units of b where vector kVector has the place kPlace of a group, else those of a.
  template <int kVector, int kPlace>
  static COREAI_HD U blended(U a, U b) {
    U result = a, from;
#pragma GCC unroll 64
    for (int i = 0; i < kCount; ++i) {
      const bool is_b = (kVector * kPlaces + i / kPieces) % kUnits == kPlace;
      from[i] = is_b ? kCount + i : i;
#if defined(__clang__)
      result[i] = is_b ? b[i] : a[i];
#endif
    }
#if !defined(__clang__)
    result = __builtin_shuffle(a, b, from);
#endif
    return result;
  }
};

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
