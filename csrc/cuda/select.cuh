// Masks of the largest magnitudes of several tensors together, on a GPU.
//
// A radix select: each pass counts the values of one digit among the elements whose leading digits are those of the
// threshold, and a single block then picks the threshold's digit. All of it stays on the device: the host queues a
// fixed number of kernels and waits for none. Counts are whole numbers, so that the order of the additions does not
// show. Where not all ties are kept, the ties in each chunk are counted and summed up in order, and only the chunk
// in which the quota ends ranks its own.
//
// Nothing here knows torch; tests/kernels/emulation runs this file on the CPU.
#pragma once

#include <cstring>

#include "common/magnitude.h"
#include "cuda/launch.cuh"

namespace coreai::cuda {

#if defined(COREAI_EMULATED_THREADS)
constexpr int kThreads = COREAI_EMULATED_THREADS;
constexpr int64_t kMostChunks = 5;
#else
constexpr int kThreads = 512;
constexpr int64_t kMostChunks = 2048;
#endif
constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;
constexpr int kCopies = 4;  // of the bins of a block, against conflicts: elements are mostly of a few magnitudes

using Count = unsigned long long;

// Dense memory in row-major order, and as much for the mask.
struct DeviceTensor {
  Element element;
  const void* input;
  void* mask;
  int64_t numel;
};

// What the passes know of the threshold: its leading digits; of the elements with these digits, how many are to be
// kept and how many there are.
struct State {
  Count threshold;
  Count keep;
  Count equal;
};

template <Element kElement>
struct Pack {
  using Word = WordOf<kElement>;
  static constexpr int kSize = 16 / sizeof(Word);
  static constexpr int64_t kTile = int64_t{kSize} * kThreads;  // elements that a block loads at once
  Word word[kSize];

  // Elements [at, end), as far as they fit.
  static __device__ __forceinline__ Pack load(const Word* x, int64_t at, int64_t end, bool aligned) {
    Pack pack;
    if (aligned && at + kSize <= end) {
      const uint4 raw = *reinterpret_cast<const uint4*>(x + at);
      memcpy(pack.word, &raw, sizeof(raw));
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) pack.word[i] = at + i < end ? x[at + i] : Word{0};
    }
    return pack;
  }
  __device__ __forceinline__ void store(Word* x, int64_t at, int64_t end, bool aligned) const {
    if (aligned && at + kSize <= end) {
      uint4 raw;
      memcpy(&raw, word, sizeof(raw));
      *reinterpret_cast<uint4*>(x + at) = raw;
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (at + i < end) x[at + i] = word[i];
      }
    }
  }
};

// Exclusive sum over the threads of the block, and the total. `scratch` holds kThreads values.
__device__ __forceinline__ Count sum_before(Count value, Count* scratch, Count& total) {
  const int thread = static_cast<int>(threadIdx.x);
  scratch[thread] = value;
  __syncthreads();
  for (int step = 1; step < kThreads; step *= 2) {
    const Count other = thread >= step ? scratch[thread - step] : 0;
    __syncthreads();
    scratch[thread] += other;
    __syncthreads();
  }
  total = scratch[kThreads - 1];
  const Count inclusive = scratch[thread];
  __syncthreads();
  return inclusive - value;
}

__global__ void start_select(State* state, Count keep) {
  if (threadIdx.x == 0) *state = {0, keep, 0};
}

template <Element kFrom, Element kTo>
__global__ void __launch_bounds__(kThreads) count_digits(const WordOf<kFrom>* x, int64_t numel, int64_t chunk, int shift,
                                                         int bits, const State* state, Count* bins) {
  using P = Pack<kFrom>;
  __shared__ unsigned counts[kCopies * kBins];
  for (int i = static_cast<int>(threadIdx.x); i < kCopies * kBins; i += kThreads) counts[i] = 0;
  __syncthreads();
  const auto prefix = static_cast<WordOf<kTo>>(state->threshold >> (shift + bits));
  const bool aligned = is_aligned(x);
  unsigned* own = counts + threadIdx.x / 32 % kCopies * kBins;
  const int64_t begin = blockIdx.x * chunk, end = begin + chunk < numel ? begin + chunk : numel;
  for (int64_t at = begin + static_cast<int64_t>(threadIdx.x) * P::kSize; at < end; at += P::kTile) {
    const P pack = P::load(x, at, end, aligned);
#pragma unroll
    for (int i = 0; i < P::kSize; ++i) {
      const WordOf<kTo> key = widen_key<kFrom, kTo>(magnitude_key<kFrom>(pack.word[i]));
      if (at + i < end && static_cast<WordOf<kTo>>(key >> (shift + bits)) == prefix) {
        atomicAdd(own + key_digit(key, shift, bits), 1u);
      }
    }
  }
  __syncthreads();
  for (int bin = static_cast<int>(threadIdx.x); bin < 1 << bits; bin += kThreads) {
    Count sum = 0;
    for (int copy = 0; copy < kCopies; ++copy) sum += counts[copy * kBins + bin];
    if (sum != 0) atomicAdd(bins + bin, sum);
  }
}

// One block: the digit of the threshold, and clean bins for the next pass.
__global__ void __launch_bounds__(kThreads) pick_digit(State* state, Count* bins, int shift, int bits) {
  __shared__ Count scratch[kThreads];
  constexpr int kOwn = (kBins + kThreads - 1) / kThreads;
  const Count keep = state->keep;
  const int count = 1 << bits;
  // Thread 0 has the highest bins: the sum over the threads before is that of the elements above.
  const int last = count - 1 - static_cast<int>(threadIdx.x) * kOwn;
  Count own = 0;
  for (int i = 0; i < kOwn; ++i) own += last - i >= 0 ? bins[last - i] : 0;
  Count total = 0, above = sum_before(own, scratch, total);
  for (int i = 0; i < kOwn && last - i >= 0; ++i) {
    const Count here = bins[last - i];
    if (above < keep && keep <= above + here) {
      state->threshold |= static_cast<Count>(last - i) << shift;
      state->keep = keep - above;
      state->equal = here;
    }
    above += here;
    bins[last - i] = 0;
  }
}

template <Element kFrom, Element kTo>
__global__ void __launch_bounds__(kThreads)
    count_ties(const WordOf<kFrom>* x, int64_t numel, int64_t chunk, const State* state, Count* ties) {
  using P = Pack<kFrom>;
  if (state->keep == state->equal) return;
  __shared__ unsigned found;
  if (threadIdx.x == 0) found = 0;
  __syncthreads();
  const auto threshold = static_cast<WordOf<kTo>>(state->threshold);
  const bool aligned = is_aligned(x);
  const int64_t begin = blockIdx.x * chunk, end = begin + chunk < numel ? begin + chunk : numel;
  unsigned own = 0;
  for (int64_t at = begin + static_cast<int64_t>(threadIdx.x) * P::kSize; at < end; at += P::kTile) {
    const P pack = P::load(x, at, end, aligned);
#pragma unroll
    for (int i = 0; i < P::kSize; ++i) {
      own += at + i < end && widen_key<kFrom, kTo>(magnitude_key<kFrom>(pack.word[i])) == threshold;
    }
  }
  if (own != 0) atomicAdd(&found, own);
  __syncthreads();
  if (threadIdx.x == 0) ties[blockIdx.x] = found;
}

// One block: the ties before each chunk, in place of the ties in it; at the end those in all.
__global__ void __launch_bounds__(kThreads) sum_ties(const State* state, Count* ties, int64_t chunks) {
  if (state->keep == state->equal) return;
  __shared__ Count scratch[kThreads];
  Count before = 0;
  for (int64_t first = 0; first < chunks; first += kThreads) {
    const int64_t chunk = first + threadIdx.x;
    Count total = 0;
    const Count sum = sum_before(chunk < chunks ? ties[chunk] : 0, scratch, total);
    if (chunk < chunks) ties[chunk] = before + sum;
    before += total;
  }
  if (threadIdx.x == 0) ties[chunks] = before;
}

template <Element kFrom, Element kTo>
__global__ void __launch_bounds__(kThreads) write_mask(const WordOf<kFrom>* x, WordOf<kFrom>* mask, int64_t numel,
                                                       int64_t chunk, const State* state, const Count* ties) {
  using P = Pack<kFrom>;
  using Key = WordOf<kTo>;
  __shared__ Count scratch[kThreads];
  const auto threshold = static_cast<Key>(state->threshold);
  const Count quota = state->keep;
  const bool all = quota == state->equal;
  const Count before = all ? 0 : ties[blockIdx.x], after = all ? 0 : ties[blockIdx.x + 1];
  const bool ranked = before < quota && after > quota;
  const Key lowest = all || after <= quota ? threshold : static_cast<Key>(threshold + 1);
  const bool aligned = is_aligned(x) && is_aligned(mask);
  const int64_t begin = blockIdx.x * chunk, end = begin + chunk < numel ? begin + chunk : numel;
  Count rank = before;
  for (int64_t tile = begin; tile < end; tile += P::kTile) {
    const int64_t at = tile + static_cast<int64_t>(threadIdx.x) * P::kSize;
    P pack = P::load(x, at, end, aligned);
    Key keys[P::kSize];
    Count own = 0;
#pragma unroll
    for (int i = 0; i < P::kSize; ++i) {
      keys[i] = widen_key<kFrom, kTo>(magnitude_key<kFrom>(pack.word[i]));
      own += at + i < end && keys[i] == threshold;
    }
    Count place = 0;
    if (ranked) {  // the same for all threads of the block
      Count total = 0;
      place = rank + sum_before(own, scratch, total);
      rank += total;
    }
#pragma unroll
    for (int i = 0; i < P::kSize; ++i) {
      const bool tie = ranked && keys[i] == threshold;
      pack.word[i] = keys[i] >= lowest || (tie && place < quota) ? Magnitude<kFrom>::kOne : WordOf<kFrom>{0};
      place += tie;
    }
    pack.store(mask, at, end, aligned);
  }
}

// Host side.

inline int64_t tile_of(Element element) {
  return 16 / (element == Element::kFloat64 ? 8 : element == Element::kFloat32 ? 4 : 2) * kThreads;
}

// Elements of a chunk, which one block takes: whole tiles, and not too many chunks.
inline int64_t chunk_of(const DeviceTensor& t) {
  const int64_t tile = tile_of(t.element), tiles = (t.numel + tile - 1) / tile;
  return (tiles + kMostChunks - 1) / kMostChunks * tile;
}

inline int64_t chunks_of(const DeviceTensor& t) { return t.numel == 0 ? 0 : (t.numel + chunk_of(t) - 1) / chunk_of(t); }

inline Element common_element(const std::vector<DeviceTensor>& tensors) {
  Element common = tensors.front().element;
  for (const DeviceTensor& t : tensors) {
    if (t.element == Element::kFloat64) return t.element;
    if (t.element != common) common = Element::kFloat32;
  }
  return common;
}

// 64-bit words of zeroed workspace: the state, the bins, the ties of each chunk.
inline int64_t workspace_words(const std::vector<DeviceTensor>& tensors) {
  int64_t chunks = 0;
  for (const DeviceTensor& t : tensors) chunks += chunks_of(t);
  return static_cast<int64_t>(sizeof(State) / sizeof(Count)) + kBins + chunks + 1;
}

template <Element kElement>
struct ElementTag {
  static constexpr Element value = kElement;
};

// body(from, to): types of the tensor, and that in which all are compared.
template <class Body>
void with_elements(Element from, Element to, Body body) {
  constexpr ElementTag<Element::kFloat32> fp32;
  constexpr ElementTag<Element::kBFloat16> bf16;
  constexpr ElementTag<Element::kFloat16> fp16;
  constexpr ElementTag<Element::kFloat64> fp64;
  const auto with_common = [&](auto tag) {
    if (to == Element::kFloat64) return body(tag, fp64);
    if (to == Element::kFloat32) return body(tag, fp32);
    body(tag, tag);
  };
  if (from == Element::kFloat32) return with_common(fp32);
  if (from == Element::kBFloat16) return with_common(bf16);
  if (from == Element::kFloat16) return with_common(fp16);
  body(fp64, fp64);
}

// Queues the kernels for 0 < num_keep <= number of elements. The tensors are not empty.
template <class Stream>
void queue_topk_masks(const std::vector<DeviceTensor>& tensors, int64_t num_keep, void* workspace, Stream stream) {
  auto* state = static_cast<State*>(workspace);
  auto* bins = reinterpret_cast<Count*>(state + 1);
  Count* ties = bins + kBins;
  const Element common = common_element(tensors);
  COREAI_LAUNCH(start_select, 1, kThreads, stream, state, static_cast<Count>(num_keep));
  const int width = common == Element::kFloat64 ? 63 : common == Element::kFloat32 ? 31 : 15;
  for (int shift = width; shift > 0;) {
    const int bits = shift < kDigitBits ? shift : kDigitBits;
    shift -= bits;
    for (const DeviceTensor& t : tensors) {
      with_elements(t.element, common, [&](auto from, auto to) {
        using Word = WordOf<decltype(from)::value>;
        auto* kernel = &count_digits<decltype(from)::value, decltype(to)::value>;
        COREAI_LAUNCH(kernel, chunks_of(t), kThreads, stream, static_cast<const Word*>(t.input), t.numel, chunk_of(t), shift,
                      bits, state, bins);
      });
    }
    COREAI_LAUNCH(pick_digit, 1, kThreads, stream, state, bins, shift, bits);
  }
  int64_t chunks = 0;
  for (const DeviceTensor& t : tensors) {
    with_elements(t.element, common, [&](auto from, auto to) {
      using Word = WordOf<decltype(from)::value>;
      auto* kernel = &count_ties<decltype(from)::value, decltype(to)::value>;
      COREAI_LAUNCH(kernel, chunks_of(t), kThreads, stream, static_cast<const Word*>(t.input), t.numel, chunk_of(t), state,
                    ties + chunks);
    });
    chunks += chunks_of(t);
  }
  COREAI_LAUNCH(sum_ties, 1, kThreads, stream, state, ties, chunks);
  chunks = 0;
  for (const DeviceTensor& t : tensors) {
    with_elements(t.element, common, [&](auto from, auto to) {
      using Word = WordOf<decltype(from)::value>;
      auto* kernel = &write_mask<decltype(from)::value, decltype(to)::value>;
      COREAI_LAUNCH(kernel, chunks_of(t), kThreads, stream, static_cast<const Word*>(t.input), static_cast<Word*>(t.mask),
                    t.numel, chunk_of(t), state, ties + chunks);
    });
    chunks += chunks_of(t);
  }
}

}  // namespace coreai::cuda
