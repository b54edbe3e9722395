// Autograd's side of the operators with a straight-through gradient, as eager mode uses them: nodes of the graph in
// C++. Nodes in Python cost more than it takes to quantize a small tensor.
//
// The stable ABI has no autograd. So this file is a library of its own, loaded only beside the torch it was built
// with; without it classes in coreai_kernels/ops do the same in Python.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace coreai {
namespace {

using at::Tensor;
using at::TensorList;
using c10::DispatchKeySet;
using c10::OperatorHandle;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using torch::jit::Stack;
using Ints = std::vector<int64_t>;

DispatchKeySet below_autograd(DispatchKeySet keys) { return keys & c10::after_autograd_keyset; }

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

const auto& masked_gradient() {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, at::IntArrayRef)>("coreai_kernels::fake_quantize_backward");
  return op;
}

const auto& masked_gradients() {
  static const auto op = find<std::vector<Tensor>(TensorList, const Tensor&, at::IntArrayRef, at::IntArrayRef)>(
      "coreai_kernels::foreach_fake_quantize_backward");
  return op;
}

const auto& mask_gradient_() {
  static const auto op = find<void(const Tensor&, const Tensor&, at::IntArrayRef)>("coreai_kernels::fake_quantize_backward_");
  return op;
}

const auto& mask_gradients_() {
  static const auto op = find<void(TensorList, const Tensor&, at::IntArrayRef, at::IntArrayRef)>(
      "coreai_kernels::foreach_fake_quantize_backward_");
  return op;
}

// Memory order of a dense tensor as the operators above take it: axes from the outermost to the innermost, those of
// size one last. Empty for row-major tensors.
Ints order_of(const Tensor& x) {
  if (x.is_contiguous()) return {};
  const auto sizes = x.sym_sizes();
  const auto strides = x.sym_strides();
  Ints order;
  for (int64_t axis = 0; axis < x.dim(); ++axis) order.push_back(axis);
  const auto ones = std::stable_partition(order.begin(), order.end(), [&](int64_t axis) { return sizes[axis] != 1; });
  std::stable_sort(order.begin(), ones, [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  return order;
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
  mask_gradient_().call(grad, mask, order);
  return grad;
}

// What a gradient of a gradient is masked with: the same.
struct MaskedGradient : Function<MaskedGradient> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& mask, const Ints& order, DispatchKeySet keys) {
    ctx->save_for_backward({mask});
    ctx->saved_data["order"] = order;
    return masked_gradient().redispatch(below_autograd(keys), grad, mask, order);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto order = ctx->saved_data["order"].toIntVector();
    return {masked(grads[0], ctx->get_saved_variables()[0], order), Tensor(), Tensor(), Tensor()};
  }
};

Tensor differentiable_masked_gradient(DispatchKeySet keys, const Tensor& grad, const Tensor& mask, at::IntArrayRef order) {
  if (!at::GradMode::is_enabled() || !grad.requires_grad()) {
    return masked_gradient().redispatch(below_autograd(keys), grad, mask, order);
  }
  return MaskedGradient::apply(grad, mask, order.vec(), keys);
}

// An operator's results are an output and the packed mask of what is inside the range; its last argument says
// whether the mask is wanted.
struct StraightThrough : Function<StraightThrough> {
  static Tensor forward(AutogradContext* ctx, const Tensor&, const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
    op.redispatchBoxed(below_autograd(keys), stack);
    const auto results = torch::jit::last(*stack, 2);
    const Tensor& output = results[0].toTensor();
    ctx->save_for_backward({results[1].toTensor()});
    ctx->saved_data["order"] = order_of(output);
    return output;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto order = ctx->saved_data["order"].toIntVector();
    return {masked(grads[0], ctx->get_saved_variables()[0], order), Tensor(), Tensor(), Tensor()};
  }
};

void straight_through(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  const Tensor input = torch::jit::peek(*stack, 0, op.schema().arguments().size()).toTensor();
  if (!at::GradMode::is_enabled() || !input.requires_grad()) {
    op.redispatchBoxed(below_autograd(keys), stack);
    return;
  }
  stack->back() = true;
  Tensor output = StraightThrough::apply(input, op, keys, stack);
  torch::jit::peek(*stack, 0, 2) = std::move(output);
}

bool any_requires_grad(TensorList tensors) {
  return at::GradMode::is_enabled() &&
         std::any_of(tensors.begin(), tensors.end(), [](const Tensor& x) { return x.requires_grad(); });
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
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({bits});
    ctx->saved_data["starts"] = starts;
    ctx->saved_data["ranks"] = ranks;
    ctx->saved_data["orders"] = orders;
  }
  static Masks saved(AutogradContext* ctx) {
    const auto ints = [&](const char* name) { return ctx->saved_data[name].toIntVector(); };
    return {ctx->get_saved_variables()[0], ints("starts"), ints("ranks"), ints("orders")};
  }

  // Masked gradients in the places of `grads`; undefined where none came.
  variable_list apply(const variable_list& grads) const {
    List free, others;
    const int64_t* order = orders.empty() ? nullptr : orders.data();
    for (size_t i = 0; i < grads.size(); ++i) {
      const int64_t rank = order ? ranks[i] : 0;
      if (grads[i].defined()) {
        List& list = is_free(grads[i], order) ? free : others;
        list.places.push_back(i);
        list.starts.push_back(starts[i]);
        list.orders.insert(list.orders.end(), order, order + rank);
      }
      order += rank;
    }
    variable_list results(grads.size());
    if (!free.places.empty()) mask_gradients_().call(free.of(grads), bits, free.starts, free.orders);
    for (size_t i : free.places) results[i] = grads[i];
    if (!others.places.empty()) {
      const auto found = masked_gradients().call(others.of(grads), bits, others.starts, others.orders);
      for (size_t i = 0; i < found.size(); ++i) results[others.places[i]] = found[i];
    }
    return results;
  }

 private:
  struct List {
    std::vector<size_t> places;
    Ints starts, orders;

    variable_list of(const variable_list& grads) const {
      variable_list its;
      for (size_t i : places) its.push_back(grads[i]);
      return its;
    }
  };
};

// As many gradients as a function has arguments, the first of which are tensors.
variable_list for_arguments(variable_list gradients, size_t others) {
  gradients.resize(gradients.size() + others);
  return gradients;
}

struct MaskedGradients : Function<MaskedGradients> {
  static variable_list forward(AutogradContext* ctx, TensorList grads, const Masks& masks, DispatchKeySet keys) {
    masks.save(ctx);
    return masked_gradients().redispatch(below_autograd(keys), grads, masks.bits, masks.starts, masks.orders);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return for_arguments(Masks::saved(ctx).apply(grads), 2);
  }
};

std::vector<Tensor> differentiable_masked_gradients(DispatchKeySet keys, TensorList grads, const Tensor& mask,
                                                    at::IntArrayRef starts, at::IntArrayRef orders) {
  if (!any_requires_grad(grads)) {
    return masked_gradients().redispatch(below_autograd(keys), grads, mask, starts, orders);
  }
  Ints ranks;
  for (const Tensor& grad : grads) ranks.push_back(grad.dim());
  return MaskedGradients::apply(grads, Masks{mask, starts.vec(), ranks, orders.vec()}, keys);
}

// The same for operators on lists. Without outputs, as when nothing was done, there is no mask either.
struct StraightThroughList : Function<StraightThroughList> {
  static variable_list forward(AutogradContext* ctx, TensorList, const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
    op.redispatchBoxed(below_autograd(keys), stack);
    const auto results = torch::jit::last(*stack, 2);
    variable_list outputs = results[0].toTensorVector();
    Masks::of(outputs, results[1].toTensor()).save(ctx);
    return outputs;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return for_arguments(Masks::saved(ctx).apply(grads), 3);
  }
};

void straight_through_list(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  const variable_list inputs = torch::jit::peek(*stack, 0, op.schema().arguments().size()).toTensorVector();
  if (!any_requires_grad(inputs)) {
    op.redispatchBoxed(below_autograd(keys), stack);
    return;
  }
  stack->back() = true;
  variable_list outputs = StraightThroughList::apply(TensorList(inputs), op, keys, stack);
  torch::jit::peek(*stack, 0, 2) = std::move(outputs);
}

TORCH_LIBRARY_IMPL(coreai_kernels, Autograd, library) {
  library.impl("fake_quantize_backward", TORCH_FN(differentiable_masked_gradient));
  library.impl("foreach_fake_quantize_backward", TORCH_FN(differentiable_masked_gradients));
  for (const char* name : {"fake_quantize_forward", "observe_and_fake_quantize_"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&straight_through>());
  }
  for (const char* name : {"foreach_fake_quantize_forward", "foreach_observe_and_fake_quantize_", "run_kept"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&straight_through_list>());
  }
}

}  // namespace
}  // namespace coreai
