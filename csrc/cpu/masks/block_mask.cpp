#include "cpu/masks/block_mask.h"

#include <algorithm>
#include <cstring>

#include "common/magnitude.h"
#include "cpu/masks/select.h"
#include "cpu/parallel_for.h"

namespace coreai::cpu {
namespace {

constexpr int64_t kGrain = 4 * kParallelElements;  // elements that are worth a thread
constexpr int64_t kPattern = 4096;                 // elements that are copied at once
constexpr int64_t kShortRun = 64;                  // shorter ones are not worth a call of the C library

int64_t first_block(const Geometry& g, int64_t row) {
  int64_t base = 0;
  for (int axis = g.outer_axes - 1; axis >= 0; --axis) {
    base += row % g.outer[axis].size * g.outer[axis].stride;
    row /= g.outer[axis].size;
  }
  return base;
}

// body(run of elements, its block) for all runs [begin, end) of elements that lie together in a block.
template <class Body>
void over_runs(const Geometry& g, int64_t begin, int64_t end, Body body) {
  for (int64_t row = begin / g.columns, column = begin % g.columns; begin < end; ++row, column = 0) {
    const int64_t base = first_block(g, row);
    for (; column < g.columns && begin < end; ++column, ++begin) body(begin, base + column);
  }
}

// Each of `count` words `run` times.
template <class Word>
void repeat(const Word* words, int64_t count, int64_t run, Word* to) {
  const auto each = [&]<int kRun>() {
    const int64_t length = kRun > 0 ? kRun : run;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < length; ++j) to[i * length + j] = words[i];
    }
  };
  switch (run) {
    case 1:
      return each.template operator()<1>();
    case 2:
      return each.template operator()<2>();
    case 4:
      return each.template operator()<4>();
    case 8:
      return each.template operator()<8>();
    case 16:
      return each.template operator()<16>();
    case 32:
      return each.template operator()<32>();
    default:
      return each.template operator()<0>();
  }
}

// The rows of the innermost outer axis are alike: pieces of one are made once.
template <class Word>
void fill_short_runs(const Geometry& g, const std::vector<Word>& words, Word* mask) {
  const int64_t length = g.run * g.columns, alike = g.outer_axes > 0 ? g.outer[g.outer_axes - 1].size : 1;
  const int64_t piece = kPattern / g.run, pieces = (g.columns + piece - 1) / piece;
  const int64_t items = g.numel / (length * alike) * pieces;
  parallel_for(items, std::max<int64_t>(1, kGrain / (alike * kPattern)), [&](int64_t begin, int64_t end) {
    Word pattern[kPattern];
    for (; begin < end; ++begin) {
      const int64_t row = begin / pieces * alike, column = begin % pieces * piece;
      const int64_t count = std::min(piece, g.columns - column);
      repeat(words.data() + first_block(g, row) + column, count, g.run, pattern);
      Word* to = mask + row * length + column * g.run;
      for (int64_t i = 0; i < alike; ++i) {
        std::memcpy(to + i * length, pattern, static_cast<size_t>(count * g.run) * sizeof(Word));
      }
    }
  });
}

template <class Word>
void fill(const Geometry& g, const std::vector<Word>& words, Word one, Word* mask) {
  if (g.run < kShortRun) return fill_short_runs(g, words, mask);
  // The C library's routines write long runs without reading the memory first, which loops do not.
  const std::vector<Word> ones(static_cast<size_t>(std::min(g.run, kPattern)), one);
  parallel_for(g.numel / g.run, std::max<int64_t>(1, kGrain / g.run), [&](int64_t begin, int64_t end) {
    over_runs(g, begin, end, [&](int64_t run, int64_t block) {
      Word* to = mask + run * g.run;
      if (words[static_cast<size_t>(block)] == 0) {
        std::memset(to, 0, static_cast<size_t>(g.run) * sizeof(Word));
        return;
      }
      for (int64_t i = 0; i < g.run; i += kPattern) {
        std::memcpy(to + i, ones.data(), static_cast<size_t>(std::min(g.run - i, kPattern)) * sizeof(Word));
      }
    });
  });
}

size_t row_major_index(const Layout& layout, size_t i) {
  return layout.block_index.empty() ? i : static_cast<size_t>(layout.block_index[i]);
}

// Ones and zeros in float64, a block each, in row-major order.
std::vector<double> choose(const Layout& layout, Element element, const void* input, int64_t num_keep) {
  const Geometry& g = layout.geometry;
  const auto blocks = static_cast<size_t>(g.blocks);
  std::vector<double> norms(blocks), ranked, chosen(blocks);
  kernels().block_norms(g, element, input, norms.data());
  if (!layout.block_index.empty()) {
    ranked.resize(blocks);
    for (size_t i = 0; i < blocks; ++i) ranked[row_major_index(layout, i)] = norms[i];
    norms.swap(ranked);
  }
  write_topk_masks({{Element::kFloat64, norms.data(), chosen.data(), g.blocks, Ints(), Ints()}}, num_keep);
  return chosen;
}

template <Element kElement>
constexpr WordOf<kElement> word_of(double chosen) {
  return chosen != 0.0 ? Magnitude<kElement>::kOne : WordOf<kElement>{0};
}

}  // namespace

void top_blocks(const Layout& layout, Element element, const void* input, void* chosen, int64_t num_keep) {
  const std::vector<double> keep = choose(layout, element, input, num_keep);
  with_element(element, [&]<Element kElement>() {
    std::transform(keep.begin(), keep.end(), static_cast<WordOf<kElement>*>(chosen), word_of<kElement>);
  });
}

void block_mask(const Layout& layout, Element element, const void* input, void* mask, int64_t num_keep) {
  const std::vector<double> keep = choose(layout, element, input, num_keep);
  with_element(element, [&]<Element kElement>() {
    using Word = WordOf<kElement>;
    std::vector<Word> words(keep.size());  // in memory order
    for (size_t i = 0; i < words.size(); ++i) words[i] = word_of<kElement>(keep[row_major_index(layout, i)]);
    fill(layout.geometry, words, Magnitude<kElement>::kOne, static_cast<Word*>(mask));
  });
}

}  // namespace coreai::cpu
