// What the operators ask of the CPU kernels. One table per instruction set, filled by kernels_<isa>.cpp.
//
// Inputs and outputs are dense, of one memory order, and may be the same memory. Block parameters are arrays
// in memory order of the blocks. Masks are packed bits in memory order of the elements.
#pragma once

#include <cstdint>

#include "common/qparams.h"
#include "common/types.h"
#include "cpu/palettes/palette_kernels.h"

namespace coreai::cpu {

// Elements that are worth a thread, as in torch's own operators: those of a training step find the threads awake.
// tools/sanitize.py gives few, so that threads share small tensors, too.
#ifndef COREAI_PARALLEL_ELEMENTS
#define COREAI_PARALLEL_ELEMENTS (1 << 15)
#endif
constexpr int64_t kParallelElements = COREAI_PARALLEL_ELEMENTS;

// In memory order every axis splits into (blocks, block); neighbours of one kind merge. What remains, from the
// inside out: `run` neighbouring elements share a block, `columns` blocks follow each other, and the rows so
// formed are addressed by `outer` axes whose stride in blocks is zero where they stay within a block.
struct Geometry {
  static constexpr int kMaxOuter = 32;
  struct Outer {
    int64_t size;
    int64_t stride;
  };

  int64_t numel = 1;
  int64_t blocks = 1;
  int64_t run = 1;
  int64_t columns = 1;
  int outer_axes = 0;
  Outer outer[kMaxOuter];
};

struct Affine {
  Format format;
  float low, high;  // quantized range
  const float* scale;
  const int32_t* zero_point;  // null: `constant` everywhere
  const float* offset;        // null: zero everywhere
  float constant;
  bool finite = false;  // known: no element is infinite, NaN or beyond 2^62
};

struct FakeQuantize {
  const Geometry* geometry;
  Element element;
  const void* input;
  void* output;
  uint8_t* mask;  // null: not wanted
  Affine affine;
};

struct RangeRequest {
  const Geometry* geometry;
  Element element;
  const void* input;
  float* low;  // one a block
  float* high;
};

struct QParams {
  float* scale;
  int32_t* zero_point;
  float* minval;
};

struct Observe {
  FakeQuantize quantize;  // its affine names the arrays below
  QParamsRule rule;
  UpdateRule update;
  QParams out;
  void* running_low;  // before (if rule says so) and after
  void* running_high;
  Element running;  // type of the two
};

enum class Storage : int { kInt8, kUInt8, kE4M3, kE5M2, kFloat32, kBFloat16, kFloat16, kFloat64 };

struct Convert {
  const Geometry* geometry;
  const void* input;
  void* output;
  Affine affine;
  Element element;  // the floating-point side: input of quantize, output of dequantize
  Storage storage;  // the quantized side
};

// One pass of topk_mask: writes ones where the key is above `high`, zeros elsewhere, counts the ones, and lists
// the elements with keys in [low, high]. Stops when the list is full; called again, it goes on.
struct TopkSplit {
  Element element;
  const void* input;
  void* mask;
  int64_t length;
  uint64_t low, high;  // keys of the element's type
  void* keys;          // words of the element's size
  uint32_t* offsets;
  int64_t capacity, count;
  int64_t done, above;
};

// Dense memory as `blocks` blocks of m rows of `inner` elements: the groups are the blocks' columns.
struct NmMask {
  Element element;
  const void* input;
  void* mask;
  int64_t blocks, inner;
  int n, m;
};

// Forward where `grad` is null. `output` is the masked weight, or the gradient to the weight.
struct SampledMask {
  Element element;
  int64_t numel;
  const void* weight;
  const float* logits;
  const void* grad;
  void* output;
  float* to_logits;
  uint64_t draw, seed;
};

struct LearnableRange {
  const Geometry* geometry;
  Element element;
  const void* grad;
  const void* input;
  void* output;
  const float* low;  // null: zero everywhere
  const float* range;
  float level_low, level_high;
  double* sums;  // (to low, to range): of each block; of a single one, for each 4096 elements
};

// `columns` columns of `rows` elements each, one after another in memory, as its results are; row j of the triangle
// `factor` says how much of the errors before it column j has to take over, and has its pivot behind them.
struct GptqColumns {
  static constexpr int64_t kMaxColumns = 256;

  int64_t columns, rows;
  const float* input;
  const float* factor;    // [columns, columns]
  const int64_t* groups;  // of each column: its row of the affine parameters, which are [groups, rows]
  float* output;          // the columns as they were quantized
  float* errors;
  Affine affine;
};

// `blocks` rows of `run` elements, a multiple of eight. `chooses`: scale and zero point are written, else read.
struct ByReciprocal {
  int64_t blocks, run;
  const float* input;
  float* output;
  uint8_t* mask;  // null: not wanted
  float* scale;
  int32_t* zero_point;
  bool chooses, is_symmetric;
  float low, high, eps;  // the least scale
};

struct ByReciprocalBackward {
  int64_t blocks, run;
  const float* grad;
  float* output;
  const uint8_t* mask;
  const float* scale;
};

struct Kernels {
  void (*apply_mask)(Element, const void* x, const void* mask, void* out, int64_t numel);
  void (*block_norms)(const Geometry&, Element, const void* x, double* norms);
  void (*fake_quantize)(const FakeQuantize&);
  void (*masked_gradient)(Element, const void* grad, void* out, const uint8_t* mask, int64_t numel);
  void (*observe_range)(const RangeRequest&);
  void (*choose_qparams)(const QParamsRule&, const float* low, const float* high, int64_t blocks, const QParams&);
  void (*observe_and_fake_quantize)(const Observe&);
  void (*quantize)(const Convert&);
  void (*dequantize)(const Convert&);
  void (*nm_mask)(const NmMask&);
  void (*topk_split)(TopkSplit&);
  int64_t (*topk_write)(Element, const void* x, void* mask, int64_t n, uint64_t threshold, int64_t ties);
  void (*sampled_mask)(const SampledMask&);
  void (*learnable_range)(const LearnableRange&);
  void (*gptq_columns)(const GptqColumns&);
  void (*fake_quantize_by_reciprocal)(const ByReciprocal&);
  void (*by_reciprocal_backward)(const ByReciprocalBackward&);
  PaletteKernels palettes;
};

const Kernels& kernels();  // of the instruction set in use

namespace generic {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace neon {
extern const Kernels kKernels;
}

// Calls body(begin, end, context) on torch's threads, with boundaries at multiples of `grain`. The files
// compiled for one instruction set must not include torch's headers: an inline function compiled there could be
// the copy that the linker keeps for everyone.
void parallel(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
int64_t threads();

}  // namespace coreai::cpu
