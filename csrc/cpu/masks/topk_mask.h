// The passes of topk_mask over a piece of a tensor. What they are passes of is in topk_mask.cpp.
#pragma once

#include "common/magnitude.h"
#include "cpu/loops.h"
#include "cpu/simd_words.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

constexpr int kListedBlindly = 3;

template <Element kElement>
struct Keys {
  using Word = WordOf<kElement>;
  using W = Words<sizeof(Word)>;
  using V = typename W::V;
  using Signed = typename W::Word;
  static constexpr int kBlock = 64;  // elements whose comparisons fill one word of bits

  // Comparisons of 64 elements with two bounds; stores the mask of those above the first.
  static COREAI_HD void compare(const Word* x, Word* mask, V high, V below, uint64_t& above, uint64_t& inside) {
    const V magnitude = W::set(static_cast<Signed>(static_cast<Word>(~Word{0}) >> 1));
    const V one = W::set(static_cast<Signed>(Magnitude<kElement>::kOne));
    above = inside = 0;
#pragma GCC unroll 32
    for (int i = 0; i < kBlock; i += W::kLanes) {
      const V key = W::load(x + i) & magnitude;
      const auto over = W::greater(key, high);
      W::store(mask + i, W::where(over, one));
      above |= W::bits(over) << i;
      inside |= W::bits(W::greater(key, below)) << i;
    }
    inside &= ~above;
  }
};

template <Element kElement>
void topk_split(TopkSplit& job) {
  using K = Keys<kElement>;
  using Word = typename K::Word;
  const Word* x = static_cast<const Word*>(job.input);
  Word* mask = static_cast<Word*>(job.mask);
  Word* keys = static_cast<Word*>(job.keys);
  uint32_t* offsets = job.offsets;
  // NaNs have many patterns; a band that starts or ends at NaN takes them all.
  const Word largest = static_cast<Word>(~Word{0}) >> 1;
  const Word high = job.high >= kNanKey<kElement> ? largest : static_cast<Word>(job.high);
  const Word below = static_cast<Word>(job.low - 1);
  const auto high_lanes = K::W::set(static_cast<typename K::Signed>(high));
  const auto below_lanes = K::W::set(static_cast<typename K::Signed>(below));
  int64_t i = job.done, count = job.count, total = job.above;
  for (; i + K::kBlock <= job.length && count + K::kBlock <= job.capacity; i += K::kBlock) {
    uint64_t above, inside;
    K::compare(x + i, mask + i, high_lanes, below_lanes, above, inside);
    total += __builtin_popcountll(above);
    const auto list_first = [&]() __attribute__((always_inline)) {
      const int64_t at = i + __builtin_ctzll(inside | uint64_t{1} << 63);
      keys[count] = magnitude_key<kElement>(x[at]);
      offsets[count] = static_cast<uint32_t>(at);
      count += inside != 0;
      inside &= inside - 1;
    };
    // Mostly there are a few. How many is random: a branch for each would be mispredicted once a block.
    for (int j = 0; j < kListedBlindly; ++j) list_first();
    while (__builtin_expect(inside != 0, false)) list_first();
  }
  if (job.length - i < K::kBlock && count + K::kBlock <= job.capacity) {
    for (; i < job.length; ++i) {
      const Word key = magnitude_key<kElement>(x[i]);
      const bool over = key > high;
      mask[i] = over ? Magnitude<kElement>::kOne : Word{0};
      total += over;
      if (!over && key >= job.low) keys[count] = key, offsets[count++] = static_cast<uint32_t>(i);
    }
  }
  job.done = i, job.count = count, job.above = total;
}

// The mask of what is above the threshold and of the first `ties` equal to it; tells how many are equal.
template <Element kElement>
int64_t topk_write(const void* input, void* output, int64_t n, uint64_t threshold, int64_t ties) {
  using K = Keys<kElement>;
  using Word = typename K::Word;
  const Word* x = static_cast<const Word*>(input);
  Word* mask = static_cast<Word*>(output);
  const Word one = Magnitude<kElement>::kOne;
  const Word high = threshold >= kNanKey<kElement> ? static_cast<Word>(~Word{0}) >> 1 : static_cast<Word>(threshold);
  const auto high_lanes = K::W::set(static_cast<typename K::Signed>(high));
  const auto below_lanes = K::W::set(static_cast<typename K::Signed>(threshold - 1));
  int64_t i = 0, found = 0;
  for (; i + K::kBlock <= n; i += K::kBlock) {
    uint64_t above, equal;
    K::compare(x + i, mask + i, high_lanes, below_lanes, above, equal);
    const int64_t before = found;
    found += __builtin_popcountll(equal);
    for (int64_t rank = before; equal != 0 && rank < ties; equal &= equal - 1, ++rank) {
      mask[i + __builtin_ctzll(equal)] = one;
    }
  }
  for (; i < n; ++i) {
    const Word key = magnitude_key<kElement>(x[i]);
    mask[i] = key > high || (key == threshold && found < ties) ? one : Word{0};
    found += key == threshold;
  }
  return found;
}

void topk_split(TopkSplit& job) {
  with_element(job.element, [&]<Element kElement>() { topk_split<kElement>(job); });
}

int64_t topk_write(Element element, const void* x, void* mask, int64_t n, uint64_t threshold, int64_t ties) {
  return with_element(element, [&]<Element kElement>() { return topk_write<kElement>(x, mask, n, threshold, ties); });
}

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
