// Autograd's side of the operators with a straight-through gradient, as eager mode uses them: nodes of the graph in
// C++. Nodes in Python cost more than it takes to quantize a small tensor.
//
// The stable ABI has no autograd. So this file is a library of its own, loaded only beside the torch it was built
// with; without it classes in coreai_kernels/ops do the same in Python.
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/library.h>

#include "autograd/nodes.h"

namespace coreai {
namespace {

using c10::OperatorHandle;
using torch::jit::Stack;

const auto& masked_gradient() {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, at::IntArrayRef)>("coreai_kernels::fake_quantize_backward");
  return op;
}

const auto& masked_gradients() {
  static const auto op = find<std::vector<Tensor>(TensorList, const Tensor&, at::IntArrayRef, at::IntArrayRef)>(
      "coreai_kernels::foreach_fake_quantize_backward");
  return op;
}

const auto& mask_in_place() {
  static const auto op =
      find<void(const Tensor&, const Tensor&, at::IntArrayRef)>("coreai_kernels::fake_quantize_backward_");
  return op;
}

const auto& mask_list_in_place() {
  static const auto op = find<void(TensorList, const Tensor&, at::IntArrayRef, at::IntArrayRef)>(
      "coreai_kernels::foreach_fake_quantize_backward_");
  return op;
}

bool lies_in_order(const Tensor& x, const int64_t* order) {
  int64_t stride = 1;
  for (int64_t i = x.dim(); i-- > 0;) {
    if (x.size(order[i]) != 1 && x.stride(order[i]) != stride) return false;
    stride *= x.size(order[i]);
  }
  return true;
}

// Whether nobody but the caller can reach the memory of a tensor. A view, such as the gradient of a linear layer's
// weight, may keep its base for itself.
bool is_sole_owner(const Tensor& x) {
  if (x.use_count() != 1 || !x.has_storage()) return false;
  const size_t owners = x.storage().use_count();
  return owners == 1 || (owners == 2 && x.is_view() && x._base().use_count() == 1);
}

// Whether a gradient may be overwritten, as autograd's engine does to sum into one. `order`: null for row-major.
bool is_free(const Tensor& grad, const int64_t* order) {
  return !at::GradMode::is_enabled() && !at::isTensorSubclassLike(grad) && is_sole_owner(grad) &&
         (order ? lies_in_order(grad, order) : grad.is_contiguous());
}

Tensor masked(const Tensor& grad, const Tensor& mask, const Ints& order) {
  if (!is_free(grad, order.empty() ? nullptr : order.data())) return masked_gradient().call(grad, mask, order);
  mask_in_place().call(grad, mask, order);
  return grad;
}

}  // namespace

variable_list StraightThrough::backward(AutogradContext* ctx, const variable_list& grads) {
  if (!grads[0].defined()) return {Tensor()};
  const auto order = ctx->saved_data.find("order");
  return {masked(grads[0], ctx->get_saved_variables()[0],
                 order == ctx->saved_data.end() ? Ints() : order->second.toIntVector())};
}

namespace {

Tensor differentiable_masked_gradient(DispatchKeySet keys, const Tensor& grad, const Tensor& mask, at::IntArrayRef order) {
  const auto run = [&] { return masked_gradient().redispatch(below_autograd(keys), grad, mask, order); };
  if (!needs_node(grad)) return run();
  return record<StraightThrough>({grad}, [&](AutogradContext* ctx) -> variable_list {
    StraightThrough::save(ctx, mask, order.vec());
    return {run()};
  })[0];
}

// An operator's results are an output and the packed mask of what is inside the range; its last argument says
// whether the mask is wanted.
void straight_through(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  const Tensor input = torch::jit::peek(*stack, 0, op.schema().arguments().size()).toTensor();
  const bool needs_tangent = has_tangent(input);
  if (!needs_node(input) && !needs_tangent) {
    op.redispatchBoxed(below_autograd(keys), stack);
    return;
  }
  stack->back() = true;
  Tensor output, mask;
  const auto run = [&] {
    const at::AutoGradMode nothing_inside(false);
    op.redispatchBoxed(below_autograd(keys), stack);
    const auto results = torch::jit::last(*stack, 2);
    output = results[0].toTensor();
    mask = results[1].toTensor();
  };
  if (needs_node(input)) {
    output = record<StraightThrough>({input}, [&](AutogradContext* ctx) -> variable_list {
      run();
      StraightThrough::save(ctx, mask, order_of(output));
      return {output};
    })[0];
  } else {
    run();
  }
  if (needs_tangent) {
    const Tensor tangent = input._fw_grad(/*level=*/0);
    output._set_fw_grad(masked_gradient().call(tangent, mask, order_of(output)), /*level=*/0, /*is_inplace_op=*/false);
  }
  torch::jit::peek(*stack, 0, 2) = std::move(output);
}

// Masks of a list lie one behind the other, at multiples of so many bytes.
constexpr int64_t kMaskAlignment = 16;

Ints mask_starts(TensorList tensors) {
  Ints starts;
  int64_t next = 0;
  for (const Tensor& x : tensors) {
    starts.push_back(next);
    constexpr int64_t unit = 8 * kMaskAlignment;
    next += (x.sym_numel().guard_int(__FILE__, __LINE__) + unit - 1) / unit * kMaskAlignment;
  }
  return starts;
}

// What the gradients of a list are masked with. Orders lie one after the other, each as long as the tensor's rank; there
// are none if all tensors are row-major.
struct Masks {
  Tensor bits;
  Ints starts, ranks, orders;

  static Masks of(const variable_list& outputs, const Tensor& bits) {
    Masks masks = {bits, mask_starts(outputs), {}, {}};
    if (std::all_of(outputs.begin(), outputs.end(), [](const Tensor& x) { return x.is_contiguous(); })) return masks;
    for (const Tensor& x : outputs) {
      Ints order = order_of(x);
      for (int64_t axis = 0; order.empty() && axis < x.dim(); ++axis) masks.orders.push_back(axis);
      masks.orders.insert(masks.orders.end(), order.begin(), order.end());
      masks.ranks.push_back(x.dim());
    }
    return masks;
  }

  void save(AutogradContext* ctx) const {
    ctx->save_for_backward({bits});
    ctx->saved_data["starts"] = starts;
    ctx->saved_data["ranks"] = ranks;
    ctx->saved_data["orders"] = orders;
  }
  static Masks saved(AutogradContext* ctx) {
    const auto ints = [&](const char* name) { return ctx->saved_data[name].toIntVector(); };
    return {ctx->get_saved_variables()[0], ints("starts"), ints("ranks"), ints("orders")};
  }

  // Masked gradients in the slots of `grads`; undefined where none came.
  variable_list apply(const variable_list& grads) const {
    List free, others;
    const int64_t* order = orders.empty() ? nullptr : orders.data();
    for (size_t i = 0; i < grads.size(); ++i) {
      const int64_t rank = order ? ranks[i] : 0;
      if (grads[i].defined()) {
        List& list = is_free(grads[i], order) ? free : others;
        list.slots.push_back(i);
        list.starts.push_back(starts[i]);
        list.orders.insert(list.orders.end(), order, order + rank);
      }
      order += rank;
    }
    variable_list results(grads.size());
    if (!free.slots.empty()) mask_list_in_place().call(free.of(grads), bits, free.starts, free.orders);
    for (size_t i : free.slots) results[i] = grads[i];
    if (!others.slots.empty()) {
      const auto found = masked_gradients().call(others.of(grads), bits, others.starts, others.orders);
      for (size_t i = 0; i < found.size(); ++i) results[others.slots[i]] = found[i];
    }
    return results;
  }

 private:
  struct List {
    std::vector<size_t> slots;
    Ints starts, orders;

    variable_list of(const variable_list& grads) const {
      variable_list its;
      for (size_t i : slots) its.push_back(grads[i]);
      return its;
    }
  };
};

struct StraightThroughList {
  static constexpr bool is_traceable = false;

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) { return Masks::saved(ctx).apply(grads); }
};

std::vector<Tensor> differentiable_masked_gradients(DispatchKeySet keys, TensorList grads, const Tensor& mask,
                                                    at::IntArrayRef starts, at::IntArrayRef orders) {
  const auto run = [&] { return masked_gradients().redispatch(below_autograd(keys), grads, mask, starts, orders); };
  if (!needs_node(grads)) return run();
  return record<StraightThroughList>(grads.vec(), [&](AutogradContext* ctx) {
    Ints ranks;
    for (const Tensor& grad : grads) ranks.push_back(grad.dim());
    Masks{mask, starts.vec(), ranks, orders.vec()}.save(ctx);
    return run();
  });
}

// The same for operators on lists. Without outputs, as when nothing was done, there is no mask either.
void straight_through_list(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  const variable_list inputs = torch::jit::peek(*stack, 0, op.schema().arguments().size()).toTensorVector();
  if (!needs_node(inputs)) {
    op.redispatchBoxed(below_autograd(keys), stack);
    return;
  }
  stack->back() = true;
  variable_list outputs = record<StraightThroughList>(inputs, [&](AutogradContext* ctx) {
    op.redispatchBoxed(below_autograd(keys), stack);
    const auto results = torch::jit::last(*stack, 2);
    variable_list found = results[0].toTensorVector();
    Masks::of(found, results[1].toTensor()).save(ctx);
    return found;
  });
  torch::jit::peek(*stack, 0, 2) = std::move(outputs);
}

TORCH_LIBRARY_IMPL(coreai_kernels, Autograd, library) {
  library.impl("fake_quantize_backward", TORCH_FN(differentiable_masked_gradient));
  library.impl("foreach_fake_quantize_backward", TORCH_FN(differentiable_masked_gradients));
  for (const char* name : {"fake_quantize_forward", "observe_and_fake_quantize_"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&straight_through>());
  }
  for (const char* name : {"foreach_fake_quantize_forward", "foreach_observe_and_fake_quantize_"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&straight_through_list>());
  }
}

}  // namespace
}  // namespace coreai
