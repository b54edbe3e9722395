// Fake quantization in eager mode, called from Python past the dispatcher: what the dispatcher and its arguments cost is
// more than it takes to quantize a small tensor.
//
// A fake quantizer is called again and again with tensors of one kind, and the same state. Its step is made ready once; a
// call makes sure that all is as it was, and that nobody stands between eager mode and the kernel who has to be asked.
#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <utility>

#include "autograd/nodes.h"
#include "kept_step.h"

namespace coreai {
namespace {

namespace py = pybind11;
using Optional = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Places = std::vector<std::pair<py::dict, py::str>>;

// Whether the dispatcher would come to the kernel by way of autograd alone. Autocast has nothing to say about it.
bool is_plain_eager() {
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return local.included_ == c10::default_included_set &&
         (local.excluded_ | c10::autocast_dispatch_keyset) == c10::default_excluded_set &&
         !at::impl::torch_function_mode_enabled();
}

// Keys of tensors that have nothing special about them.
DispatchKeySet plain_keys() {
  static const auto keys = [] {
    const c10::InferenceMode ordinary(false);
    return at::detail::empty_cpu({0}, at::kFloat).key_set();
  }();
  return keys;
}

// A tensor that has to go on holding its values at the same place.
class Placed {
 public:
  explicit Placed(Tensor tensor)
      : tensor_(std::move(tensor)), data_(tensor_.const_data_ptr()), numel_(tensor_.numel()), type_(tensor_.scalar_type()) {}
  bool is_same(const Tensor& other) const { return tensor_.is_same(other); }
  bool is_in_place() const {
    return tensor_.const_data_ptr() == data_ && tensor_.numel() == numel_ && tensor_.scalar_type() == type_ &&
           tensor_.is_contiguous();
  }

 private:
  Tensor tensor_;
  const void* data_;
  int64_t numel_;
  at::ScalarType type_;
};

// An entry of a dictionary that has to go on being the same tensor, or none.
class Entry {
 public:
  Entry(py::dict place, py::str key) : place_(std::move(place)), key_(std::move(key)) {
    if (PyObject* now = get()) value_.emplace(THPVariable_Unpack(now));
  }
  bool holds() const {
    PyObject* now = get();
    if (now == nullptr) return !value_;
    return value_ && THPVariable_Check(now) && value_->is_same(THPVariable_Unpack(now)) && value_->is_in_place();
  }

 private:
  // Null for None, too.
  PyObject* get() const {
    PyObject* value = PyDict_GetItemWithError(place_.ptr(), key_.ptr());
    return value == Py_None ? nullptr : value;
  }

  py::dict place_;
  py::str key_;
  std::optional<Placed> value_;
};

class Step {
 public:
  // `name`: the operator that does the same, for the profiler.
  Step(const char* name, const Tensor& input, std::unique_ptr<KeptStep> step, std::vector<Entry> entries,
       const Tensors& switches)
      : name_(name), step_(std::move(step)), sizes_(input.sizes().vec()), strides_(input.strides().vec()), order_(order_of(input)),
        type_(input.scalar_type()), entries_(std::move(entries)) {
    for (const Tensor& one : switches) {
      const auto* byte = static_cast<const uint8_t*>(one.const_data_ptr());
      switches_.push_back({one, byte, *byte});
    }
  }

  // The output; None if something is not as it was.
  py::object operator()(py::handle object) const {
    if (!THPVariable_CheckExact(object.ptr())) return py::none();
    const Tensor& input = THPVariable_Unpack(object.ptr());
    if (!suits(input) || !is_plain_eager() || !is_as_it_was()) return py::none();
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(run(input)));
  }

 private:
  struct Switch {
    Tensor tensor;
    const uint8_t* byte;
    uint8_t value;
  };

  bool suits(const Tensor& input) const {
    return input.key_set() == plain_keys() && input.scalar_type() == type_ && input.sizes().equals(sizes_) &&
           input.strides().equals(strides_);
  }
  bool is_as_it_was() const {
    return std::all_of(switches_.begin(), switches_.end(), [](const Switch& one) { return *one.byte == one.value; }) &&
           std::all_of(entries_.begin(), entries_.end(), [](const Entry& one) { return one.holds(); });
  }

  Tensor run(const Tensor& input) const {
    const py::gil_scoped_release others_may_run;
    RECORD_FUNCTION(name_, std::vector<c10::IValue>({input}));
    Tensor output = at::detail::empty_strided_cpu(sizes_, strides_, type_);
    if (!needs_node(input)) {
      step_->run(input.const_data_ptr(), output.mutable_data_ptr(), nullptr);
      return output;
    }
    return record<StraightThrough>({input}, [&](AutogradContext* ctx) -> variable_list {
      const Tensor mask = at::detail::empty_cpu({(input.numel() + 7) / 8}, at::kByte);
      step_->run(input.const_data_ptr(), output.mutable_data_ptr(), mask.mutable_data_ptr<uint8_t>());
      StraightThrough::save(ctx, mask, order_);
      return {output};
    })[0];
  }

  const char* name_;
  std::unique_ptr<KeptStep> step_;
  Ints sizes_, strides_, order_;
  at::ScalarType type_;
  std::vector<Entry> entries_;
  std::vector<Switch> switches_;
};

// A function of tensors like `input`, with the step that make_ready() finds; None if there is none.
template <class MakeReady>
py::object keep(const char* name, const Tensor& input, const std::vector<Optional>& state, const Places& places,
                const Tensors& switches, MakeReady make_ready) {
  const auto is_plain = [](const Tensor& x) { return x.key_set() == plain_keys(); };
  const auto suits = [&](const Optional& x) { return !x || (is_plain(*x) && x->is_contiguous()); };
  const auto is_byte = [&](const Tensor& x) { return is_plain(x) && x.numel() == 1 && x.element_size() == 1; };
  if (!is_plain_eager() || !is_plain(input) || !std::all_of(state.begin(), state.end(), suits) ||
      !std::all_of(switches.begin(), switches.end(), is_byte)) {
    return py::none();
  }
  std::unique_ptr<KeptStep> ready;
  {
    const at::AutoDispatchBelowAutograd nothing_recorded;
    ready.reset(reinterpret_cast<KeptStep*>(make_ready()));
  }
  if (!ready) return py::none();
  std::vector<Entry> entries;
  for (const auto& [place, key] : places) entries.emplace_back(place, key);
  const auto step = std::make_shared<const Step>(name, input, std::move(ready), std::move(entries), switches);
  return py::cpp_function([step](py::handle x) { return (*step)(x); }, py::arg("input"));
}

py::object keep_simulation(const Tensor& input, const Tensor& scale, const Optional& zero_point, const Optional& minval,
                           const Ints& block_size, int64_t format, double quant_min, double quant_max,
                           const Places& places, const Tensors& switches) {
  using Signature = int64_t(const Tensor&, const Tensor&, const Optional&, const Optional&, at::IntArrayRef, int64_t, double,
                            double);
  static const auto op = find<Signature>("coreai_kernels::keep_simulation");
  return keep("coreai_kernels::fake_quantize_forward", input, {scale, zero_point, minval}, places, switches, [&] {
    return op.call(input, scale, zero_point, minval, block_size, format, quant_min, quant_max);
  });
}

py::object keep_step(const Tensor& input, const Tensor& scale, const Optional& zero_point, const Optional& minval,
                     const Optional& running_min, const Optional& running_max, bool has_running, const Tensor& settings,
                     const Places& places, const Tensors& switches) {
  using Signature = int64_t(const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&,
                            const Optional&, bool, const Tensor&);
  static const auto op = find<Signature>("coreai_kernels::keep_step");
  return keep("coreai_kernels::observe_and_fake_quantize_", input, {scale, zero_point, minval, running_min, running_max},
              places, switches, [&] {
                return op.call(input, scale, zero_point, minval, running_min, running_max, has_running, settings);
              });
}

}  // namespace
}  // namespace coreai

PYBIND11_MODULE(_C_autograd, module) {
  module.doc() = "Autograd's side of coreai_kernels in eager mode. Importing it registers nodes with torch's dispatcher.";
  const char* doc = "A function of tensors like the first argument, or None: see coreai_kernels/ops/kept.py.";
  module.def("keep_simulation", &coreai::keep_simulation, doc);
  module.def("keep_step", &coreai::keep_step, doc);
}
