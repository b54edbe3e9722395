// The straight-through gradient through a packed mask, on a GPU.
//
// A product with 0 or 1, so that NaN and infinite gradients behave as IEEE 754 says. In place, packs that pass whole are
// not even read.
#pragma once

#include "cuda/quantize/tiles.cuh"

namespace coreai::cuda {

// Two products of 16-bit elements with factors that are 0 or 1.
template <Element kElement>
__device__ __forceinline__ uint32_t multiply(uint32_t words, uint32_t factors) {
#if defined(COREAI_EMULATED_THREADS)
  const auto product = [&](int shift) {
    return widen<kElement>(words >> shift & 0xffff) * widen<kElement>(factors >> shift & 0xffff);
  };
  return narrow<kElement>(product(0), product(16));
#else
  uint32_t result;
  if constexpr (kElement == Element::kBFloat16) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(words), "r"(factors), "r"(0x80008000u));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(words), "r"(factors), "r"(0x80008000u));
  }
  return result;
#endif
}

// The pack where its bits are set, times zero elsewhere.
template <Element kElement>
__device__ __forceinline__ Pack<kElement> masked(Pack<kElement> pack, uint32_t bits) {
  if constexpr (kElement == Element::kFloat32) {
    float values[4];
    pack.unpack(values);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((bits & 1u << i) == 0) values[i] *= 0.0f;
    }
    return Pack<kElement>::of(values);
  } else {
    // Of a pair, the second bit is brought to the upper half; a product with what is left of 1 then makes it the type's.
    constexpr uint32_t kOne = Magnitude<kElement>::kOne;
    static_assert(kOne % 64 == 0);
    const uint32_t spread = bits * 0x8001u;
    const auto pair = [&](uint32_t words, int i) {
      return multiply<kElement>(words, (spread & 0x10001u << (2 * i)) * (kOne >> (2 * i)));
    };
    return {{pair(pack.raw.x, 0), pair(pack.raw.y, 1), pair(pack.raw.z, 2), pair(pack.raw.w, 3)}};
  }
}

struct GradientJob {
  const void* grad;
  void* output;
  const uint8_t* mask;
  int64_t numel;
  int64_t tiles;  // whole ones
};

template <Element kElement, bool kInPlace>
__global__ void __launch_bounds__(kThreads) masked_gradient(GradientJob job) {
  using P = Pack<kElement>;
  using Word = WordOf<kElement>;
  constexpr int kTile = kThreads * kUnroll;
  constexpr uint32_t kAll = (1u << P::kSize) - 1;
  constexpr int kOfByte = 8 / P::kSize;
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t tile = blockIdx.x; tile < job.tiles; tile += gridDim.x) {
    const int64_t own = tile * kTile + thread / kWarp * (kWarp * kUnroll) + thread % kWarp;
    const uint4* x = static_cast<const uint4*>(job.grad) + own;
    uint4* y = static_cast<uint4*>(job.output) + own;
    const uint8_t* bytes = job.mask + own / kOfByte;
    const int shift = P::kSize == 8 ? 0 : 4 * (thread % 2);
    uint32_t bits[kUnroll];
    P pack[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      bits[i] = bytes[i * kWarp / kOfByte];
      if constexpr (!kInPlace) pack[i].raw = x[i * kWarp];
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      bits[i] = bits[i] >> shift & kAll;
      if constexpr (kInPlace) {
        if (bits[i] == kAll) continue;
        pack[i].raw = x[i * kWarp];
      }
      y[i * kWarp] = masked<kElement>(pack[i], bits[i]).raw;
    }
  }
  // What is left: a byte of the mask for each thread.
  const int64_t done = job.tiles * kTile * P::kSize, step = int64_t{gridDim.x} * kThreads * 8;
  for (int64_t begin = done + (int64_t{blockIdx.x} * kThreads + thread) * 8; begin < job.numel; begin += step) {
    const Word* x = static_cast<const Word*>(job.grad) + begin;
    Word* y = static_cast<Word*>(job.output) + begin;
    const uint32_t bits = job.mask[begin / 8];
    const int n = static_cast<int>(job.numel - begin < 8 ? job.numel - begin : 8);
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
      if (kInPlace && (bits >> i & 1) != 0) continue;
      const float value = load_element<kElement>(x + i);
      store_element<kElement>(y + i, (bits >> i & 1) != 0 ? value : value * 0.0f);
    }
  }
}

// Host side: of a gradient that is not empty. `output` is `grad`, or does not overlap it.
template <class Stream>
void queue_masked_gradient(Element element, const void* grad, void* output, const uint8_t* mask, int64_t numel,
                           int64_t most_blocks, Stream stream) {
  with_16_or_32_bits(element, [&](auto tag) {
    constexpr Element kElement = decltype(tag)::value;
    constexpr int kSize = Pack<kElement>::kSize;
    const int64_t tiles = is_aligned(grad) && is_aligned(output) ? numel / (int64_t{kThreads} * kUnroll * kSize) : 0;
    // Of tensors that are not aligned all is left.
    const int64_t units = tiles > 0 ? tiles : blocks_for((numel + 7) / 8);
    auto* kernel = grad == output ? &masked_gradient<kElement, true> : &masked_gradient<kElement, false>;
    COREAI_LAUNCH(kernel, blocks_of_tiles(units, most_blocks), kThreads, stream,
                  GradientJob{grad, output, mask, numel, tiles});
  });
}

}  // namespace coreai::cuda
