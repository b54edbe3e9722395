// How the kernels of this folder share a tensor out.
#pragma once

#include "cuda/pack.cuh"

namespace coreai::cuda {

#if defined(COREAI_EMULATED_THREADS)
constexpr int kThreads = COREAI_EMULATED_THREADS;
#else
constexpr int kThreads = 256;
#endif
constexpr int kWarp = 32;
constexpr int kUnroll = 4;  // packs of neighbouring warps' width that a thread asks for before it waits

template <Element kElement>
struct ElementTag {
  static constexpr Element value = kElement;
};

template <class Body>
void with_16_or_32_bits(Element element, Body body) {
  if (element == Element::kBFloat16) return body(ElementTag<Element::kBFloat16>{});
  if (element == Element::kFloat16) return body(ElementTag<Element::kFloat16>{});
  body(ElementTag<Element::kFloat32>{});
}

inline int64_t blocks_for(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

// Whole tiles of kUnroll packs for each thread of a block, so many that run at the same time; at least one block.
inline int64_t blocks_of_tiles(int64_t tiles, int64_t most_blocks) {
  return tiles < 1 ? 1 : tiles < most_blocks ? tiles : most_blocks;
}

}  // namespace coreai::cuda
