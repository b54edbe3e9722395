// Registration of the CPU kernels for masks, through the stable ABI.
#include <torch/csrc/stable/library.h>

#include "cpu/masks/block_mask.h"
#include "cpu/masks/select.h"
#include "ops/tensors.h"

namespace coreai {
namespace {

// The input stays as it is until the mask is complete: not so where an operand is its own output.
cpu::MaskTensor mask_tensor(const Tensor& weight, Operand& x) {
  if (weight.numel() > 0 && x.output.const_data_ptr() == x.data) {
    x.output = empty(x.shape, to_ints(x.output.strides()), weight.scalar_type());
  }
  const Ints natural = natural_order(x.shape.size());
  const bool row_major = std::equal(natural.begin(), natural.end(), x.order.begin()) || x.shape.size() < 2;
  return {element_of("weight", weight), x.data, x.output.mutable_data_ptr(), weight.numel(), x.shape,
          row_major ? Ints() : x.order};
}

// The memory that a weight's norms are read from, for results of another shape.
struct Input {
  Ints shape, order;
  Tensor dense;

  explicit Input(const Tensor& weight) : shape(to_ints(weight.sizes())), dense(weight) {
    const Ints strides = to_ints(weight.strides());
    order = memory_order(shape, strides);
    if (is_dense(shape, strides, order)) return;
    dense = torch::stable::empty_like(weight);
    torch::stable::copy_(dense, weight);
    order = memory_order(shape, to_ints(dense.strides()));
  }
};

std::vector<Tensor> topk_masks(std::vector<Tensor> weights, int64_t num_keep) {
  std::vector<Operand> operands;
  std::vector<cpu::MaskTensor> tensors;
  std::vector<Tensor> masks;
  operands.reserve(weights.size());
  for (const Tensor& weight : weights) {
    operands.emplace_back(weight, weight.scalar_type());
    tensors.push_back(mask_tensor(weight, operands.back()));
    masks.push_back(operands.back().output);
  }
  if (cpu::write_topk_masks(tensors, num_keep)) return masks;
  // So many ties that all elements are needed in the order of their indices.
  std::vector<Tensor> rows;
  for (const Tensor& weight : weights) rows.push_back(torch::stable::contiguous(weight));
  const std::vector<Tensor> found = topk_masks(rows, num_keep);
  for (size_t i = 0; i < masks.size(); ++i) torch::stable::copy_(masks[i], found[i]);
  return masks;
}

Tensor topk_mask(Tensor weight, int64_t num_keep) { return topk_masks({weight}, num_keep).front(); }

Tensor nm_mask(Tensor weight, int64_t n, int64_t m, int64_t axis) {
  Operand x(weight, weight.scalar_type());
  if (weight.numel() == 0) return x.output;
  int64_t inner = 1;
  for (size_t i = x.order.size(); i-- > 0 && x.order[i] != axis;) inner *= x.shape[static_cast<size_t>(x.order[i])];
  cpu::kernels().nm_mask({element_of("weight", weight), x.data, x.output.mutable_data_ptr(), weight.numel() / (m * inner),
                          inner, static_cast<int>(n), static_cast<int>(m)});
  return x.output;
}

Tensor block_mask(Tensor weight, int64_t num_keep, Blocks block_size) {
  Operand x(weight, weight.scalar_type());
  const auto layout = cpu::make_layout(x.shape, x.order, block_size);
  if (weight.numel() > 0) {
    cpu::block_mask(layout, element_of("weight", weight), x.data, x.output.mutable_data_ptr(), num_keep);
  }
  return x.output;
}

Tensor top_blocks(Tensor weight, int64_t num_keep, Blocks block_size) {
  const Input x(weight);
  const auto layout = cpu::make_layout(x.shape, x.order, block_size);
  Tensor chosen = empty(grid_of(x.shape, block_size), weight.scalar_type());
  if (weight.numel() > 0) {
    cpu::top_blocks(layout, element_of("weight", weight), x.dense.const_data_ptr(), chosen.mutable_data_ptr(), num_keep);
  }
  return chosen;
}

Tensor apply_mask(Tensor weight, Tensor mask) {
  STD_TORCH_CHECK(mask.scalar_type() == weight.scalar_type(), "mask must have the weight's dtype");
  STD_TORCH_CHECK(mask.numel() == weight.numel(), "mask must have the weight's shape");
  Operand x(weight, weight.scalar_type());
  if (weight.numel() == 0) return x.output;
  const Ints strides = to_ints(x.output.strides());
  Tensor factor = mask;
  if (!is_dense(x.shape, to_ints(mask.strides()), x.order)) {
    factor = empty(x.shape, strides, mask.scalar_type());
    torch::stable::copy_(factor, mask);
  }
  cpu::kernels().apply_mask(element_of("weight", weight), x.data, factor.const_data_ptr(), x.output.mutable_data_ptr(),
                            weight.numel());
  return x.output;
}

STABLE_TORCH_LIBRARY_IMPL(coreai_kernels, CPU, library) {
  COREAI_IMPL("apply_mask", &apply_mask);
  COREAI_IMPL("block_mask", &block_mask);
  COREAI_IMPL("nm_mask", &nm_mask);
  COREAI_IMPL("top_blocks", &top_blocks);
  COREAI_IMPL("topk_mask", &topk_mask);
  COREAI_IMPL("topk_masks", &topk_masks);
}

}  // namespace
}  // namespace coreai
