// Nodes of autograd's graph, and the straight-through estimator's.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <memory>
#include <vector>

namespace coreai {

using at::Tensor;
using at::TensorList;
using c10::DispatchKeySet;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Ints = std::vector<int64_t>;

inline DispatchKeySet below_autograd(DispatchKeySet keys) { return keys & c10::after_autograd_keyset; }

template <class Backward>
auto new_node() {
  using Node = torch::autograd::CppNode<Backward>;
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13
  std::shared_ptr<Node> node(new Node(), torch::autograd::deleteNode);
#else
  auto node = c10::make_intrusive<Node>();
#endif
  node->set_ctx_grad_fn(node);
  return node;
}

// Puts a node between the inputs and what `run`, given its context, returns: tensors of their own. As
// torch::autograd::Function does, but without what it keeps and looks up for outputs that might be inputs or views,
// and for gradients of zeros, which takes longer for hundreds of tensors than all the rest.
template <class Backward, class Run>
variable_list record(const variable_list& inputs, Run run) {
  const auto node = new_node<Backward>();
  node->is_variable_input_.assign(inputs.size(), true);
  node->set_next_edges(torch::autograd::collect_next_edges(inputs));
  node->clear_input_metadata();
  node->ctx_.set_materialize_grads(false);
  variable_list outputs;
  {
    const at::AutoGradMode nothing_inside(false);
    outputs = run(&node->ctx_);
  }
  torch::autograd::set_history(outputs, node);
  node->save_variables_to_ctx();
  return outputs;
}

inline bool needs_node(TensorList inputs) {
  return at::GradMode::is_enabled() &&
         std::any_of(inputs.begin(), inputs.end(), [](const Tensor& x) { return x.requires_grad(); });
}

// Whether a tensor carries a tangent of forward-mode differentiation, of which nodes know nothing.
inline bool has_tangent(const Tensor& x) { return x._fw_grad(/*level=*/0).defined(); }

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Memory order of a dense tensor as the operators of this library take it: axes from the outermost to the innermost,
// those of size one last. Empty for row-major tensors.
inline Ints order_of(const Tensor& x) {
  if (x.is_contiguous()) return {};
  const auto sizes = x.sym_sizes();
  const auto strides = x.sym_strides();
  Ints order;
  for (int64_t axis = 0; axis < x.dim(); ++axis) order.push_back(axis);
  const auto ones = std::stable_partition(order.begin(), order.end(), [&](int64_t axis) { return sizes[axis] != 1; });
  std::stable_sort(order.begin(), ones, [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  return order;
}

// The gradient of an output with its packed mask, and of that gradient: what it is masked with is the same.
struct StraightThrough {
  static constexpr bool is_traceable = false;

  static void save(AutogradContext* ctx, const Tensor& mask, const Ints& order) {
    ctx->save_for_backward({mask});
    if (!order.empty()) ctx->saved_data["order"] = order;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads);
};

}  // namespace coreai
