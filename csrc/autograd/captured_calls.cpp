// The fast path of eager mode: captured calls of fake quantization, run from Python past the dispatcher. What the
// dispatcher and its arguments cost is more than it takes to quantize a small tensor.
//
// A fake quantizer is called again and again with tensors of one kind and the same state. Its call is captured once; one
// guard makes sure that all is as it was, and that nobody stands between eager mode and the kernel who has to be asked.
#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_strided_ops.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <optional>
#include <utility>

#include "autograd/nodes.h"
#include "ops/captured.h"

namespace coreai {
namespace {

namespace py = pybind11;
using Optional = std::optional<Tensor>;

// Why a call was not run from its capture. The names are what Python shows.
enum class Miss { kInput, kMode, kState, kMemory, kSwitch, kHook, kClass, kCount };
constexpr std::array<const char*, 7> kMissNames = {"input", "mode", "state", "memory", "switch", "hook", "class"};

// Guarded by the GIL, as everything here but the kernels.
struct Counters {
  uint64_t hits = 0;
  std::array<uint64_t, static_cast<size_t>(Miss::kCount)> misses = {};
};
Counters counters;

// Whether the dispatcher would come to the kernel by way of autograd alone. Autocast has nothing to say about it.
bool is_plain_eager() {
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return local.included_ == c10::default_included_set &&
         (local.excluded_ | c10::autocast_dispatch_keyset) == c10::default_excluded_set &&
         !at::impl::torch_function_mode_enabled();
}

// Keys of a backend's tensors that have nothing special about them.
DispatchKeySet plain_keys(c10::DispatchKey backend) {
  const DispatchKeySet keys(backend);
  const auto component = keys.highestBackendKey();
  return keys | c10::getAutocastRelatedKeySetFromBackend(component) | c10::getAutogradRelatedKeySetFromBackend(component);
}

bool is_plain(const Tensor& x) {
  static const DispatchKeySet on_cpu = plain_keys(c10::DispatchKey::CPU), on_cuda = plain_keys(c10::DispatchKey::CUDA);
  const DispatchKeySet keys = x.key_set();
  return keys == on_cpu || keys == on_cuda;
}

// A tensor that has to keep its values at the same place.
class Placed {
 public:
  explicit Placed(const Tensor& tensor)
      : tensor_(tensor), data_(tensor.const_data_ptr()), numel_(tensor.numel()), type_(tensor.scalar_type()) {}
  bool holds() const {
    return tensor_.const_data_ptr() == data_ && tensor_.numel() == numel_ && tensor_.scalar_type() == type_ &&
           tensor_.is_contiguous();
  }

 private:
  Tensor tensor_;
  const void* data_;
  int64_t numel_;
  at::ScalarType type_;
};

// An entry of a dictionary that has to go on being the same object, or absent; None counts as absent.
class Slot {
 public:
  Slot(py::dict owner, py::str key) : owner_(std::move(owner)), key_(std::move(key)) {
    if (PyObject* now = get()) value_ = py::reinterpret_borrow<py::object>(now);
  }
  bool holds() const { return get() == value_.ptr(); }
  const py::object& value() const { return value_; }

 private:
  PyObject* get() const {
    PyObject* value = PyDict_GetItemWithError(owner_.ptr(), key_.ptr());
    return value == Py_None ? nullptr : value;
  }

  py::dict owner_;
  py::str key_;
  py::object value_;
};

// A tensor of one byte that has to keep its value. On a GPU, where reading it would be to wait, nobody may have written it.
class Switch {
 public:
  explicit Switch(const Tensor& tensor)
      : tensor_(tensor), byte_(tensor.is_cpu() ? static_cast<const uint8_t*>(tensor.const_data_ptr()) : nullptr) {
    value_ = now();
  }
  bool holds() const { return now() == value_; }

 private:
  int64_t now() const { return byte_ ? *byte_ : tensor_._version(); }

  Tensor tensor_;
  const uint8_t* byte_;
  int64_t value_;
};

// A class whose attributes, with those of its bases, have to stay: Python renews the tag when any is assigned.
class Class {
 public:
  explicit Class(py::type type) : type_(std::move(type)), tag_(now()) {}
  bool holds() const { return tag_ != 0 && now() == tag_; }

 private:
  unsigned int now() const {
    return static_cast<unsigned int>(reinterpret_cast<PyTypeObject*>(type_.ptr())->tp_version_tag);
  }

  py::type type_;
  unsigned int tag_;
};

// A dictionary of hooks that has to keep its entries. Torch numbers hooks: no two have the same key.
class Hooks {
 public:
  explicit Hooks(py::dict hooks) : hooks_(std::move(hooks)), keys_(now()) {}
  bool holds() const { return hooks_.size() == keys_.size() && (keys_.empty() || now() == keys_); }

 private:
  std::vector<Py_ssize_t> now() const {
    std::vector<Py_ssize_t> keys;
    for (const auto& item : hooks_) keys.push_back(PyLong_AsSsize_t(item.first.ptr()));
    return keys;
  }

  py::dict hooks_;
  std::vector<Py_ssize_t> keys_;
};

template <class Conditions>
bool all_hold(const Conditions& conditions) {
  return std::all_of(conditions.begin(), conditions.end(), [](const auto& one) { return one.holds(); });
}

// Everything that an owner's captured calls depend on, but for their inputs.
class Guard {
 public:
  Guard(const std::vector<std::pair<py::dict, py::str>>& slots, const std::vector<Tensor>& switches,
        const std::vector<py::dict>& hooks, const std::vector<py::type>& classes) {
    for (const auto& [owner, key] : slots) {
      slots_.emplace_back(owner, key);
      PyObject* value = slots_.back().value().ptr();
      if (value && THPVariable_Check(value)) places_.emplace_back(THPVariable_Unpack(value));
    }
    for (const Tensor& one : switches) switches_.emplace_back(one);
    for (const py::dict& one : hooks) hooks_.emplace_back(one);
    for (const py::type& type : classes) classes_.emplace_back(type);
  }

  // What does not hold; kCount if all does.
  Miss failure() const {
    if (!all_hold(slots_)) return Miss::kState;
    if (!all_hold(places_)) return Miss::kMemory;
    if (!all_hold(switches_)) return Miss::kSwitch;
    if (!all_hold(hooks_)) return Miss::kHook;
    return all_hold(classes_) ? Miss::kCount : Miss::kClass;
  }

 private:
  std::vector<Slot> slots_;
  std::vector<Placed> places_;
  std::vector<Switch> switches_;
  std::vector<Hooks> hooks_;
  std::vector<Class> classes_;
};

// One captured call, for inputs of one device, dtype, shape and strides.
class Entry {
 public:
  // `name`: the operator that does the same, for the profiler.
  Entry(const char* name, const Tensor& input, std::unique_ptr<CapturedCall> call)
      : name_(name),
        call_(std::move(call)),
        sizes_(input.sizes().vec()),
        strides_(input.strides().vec()),
        order_(order_of(input)),
        type_(input.scalar_type()),
        device_(input.device()) {}

  bool suits(const Tensor& input) const {
    return input.device() == device_ && input.scalar_type() == type_ && input.sizes().equals(sizes_) &&
           input.strides().equals(strides_);
  }

  Tensor run(const Tensor& input) const {
    RECORD_FUNCTION(name_, std::vector<c10::IValue>({input}));
    c10::OptionalDeviceGuard on_device;
    if (!device_.is_cpu()) on_device.reset_device(device_);
    Tensor output = empty(sizes_, strides_, type_);
    if (!needs_node(input)) {
      call_->run(input.const_data_ptr(), output.mutable_data_ptr(), nullptr);
      return output;
    }
    return record<StraightThrough>({input}, [&](AutogradContext* ctx) -> variable_list {
      const Tensor mask = empty({(input.numel() + 7) / 8}, {1}, at::kByte);
      call_->run(input.const_data_ptr(), output.mutable_data_ptr(), mask.mutable_data_ptr<uint8_t>());
      StraightThrough::save(ctx, mask, order_);
      return {output};
    })[0];
  }

 private:
  Tensor empty(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType type) const {
    if (device_.is_cpu()) return at::detail::empty_strided_cpu(sizes, strides, type);
    // Torch's own function for the device: it knows of memory pools, of graphs and of allocators of the user's.
    return at::_ops::empty_strided::redispatch(DispatchKeySet(c10::DispatchKey::CUDA), c10::fromIntArrayRefSlow(sizes),
                                               c10::fromIntArrayRefSlow(strides), type, std::nullopt, device_, std::nullopt);
  }

  const char* name_;
  std::unique_ptr<CapturedCall> call_;
  Ints sizes_, strides_, order_;
  at::ScalarType type_;
  c10::Device device_;
};

const CaptureFunctions& cpu_functions() {
  static const auto* found = [] {
    const py::capsule capsule = py::module_::import("coreai_kernels._C").attr("capture_functions");
    return static_cast<const CaptureFunctions*>(PyCapsule_GetPointer(capsule.ptr(), kCaptureCapsule));
  }();
  if (found == nullptr) throw py::error_already_set();
  return *found;
}

// Of CUDA tensors, if the library for them is there.
const CaptureFunctions* cuda_functions = nullptr;

bool can_capture(const Tensor& input) { return input.is_cpu() || (input.is_cuda() && cuda_functions); }

const CaptureFunctions& functions(const Tensor& input) { return input.is_cpu() ? cpu_functions() : *cuda_functions; }

AtenTensorHandle handle_of(const Tensor& tensor) { return torch::aot_inductor::new_tensor_handle(Tensor(tensor)); }
AtenTensorHandle handle_of(const Optional& tensor) { return tensor ? handle_of(*tensor) : nullptr; }

// Tensors of inference mode, which do not count how often they are written, are not plain.
bool is_switch(const Tensor& x) { return is_plain(x) && x.numel() == 1 && x.element_size() == 1; }

// The captured calls of one owner, such as a fake quantizer: one guard, and a call for each kind of input.
class CapturedCalls {
 public:
  CapturedCalls(const std::vector<std::pair<py::dict, py::str>>& slots, const std::vector<Tensor>& switches,
                const std::vector<py::dict>& hooks, const std::vector<py::type>& classes)
      : can_capture_(std::all_of(switches.begin(), switches.end(), is_switch)),
        guard_(slots, can_capture_ ? switches : std::vector<Tensor>(), hooks, classes) {}

  // The output; None if the call is not captured or something is not as it was.
  py::object call(py::handle object) {
    if (!THPVariable_CheckExact(object.ptr())) return miss(Miss::kInput);
    const Tensor& input = THPVariable_Unpack(object.ptr());
    if (!is_plain(input) || has_tangent(input)) return miss(Miss::kInput);
    if (!is_plain_eager()) return miss(Miss::kMode);
    if (const Miss failure = guard_.failure(); failure != Miss::kCount) return miss(failure);
    for (const auto& entry : entries_) {
      if (!entry->suits(input)) continue;
      ++counters.hits;
      const auto held = entry;  // another thread may capture, and drop this one
      const py::gil_scoped_release others_may_run;
      Tensor output = held->run(input);
      const py::gil_scoped_acquire back;
      return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(output)));
    }
    return miss(Miss::kInput);
  }

  bool is_valid() const { return guard_.failure() == Miss::kCount; }

  bool capture_simulation(const Tensor& input, const Tensor& scale, const Optional& zero_point, const Optional& minval,
                          const Ints& block_size, int64_t format, double quant_min, double quant_max) {
    return add("coreai_kernels::fake_quantize_forward", input, {scale, zero_point, minval}, [&] {
      return functions(input).simulation(handle_of(input), {handle_of(scale), handle_of(zero_point), handle_of(minval)},
                                         block_size.data(), block_size.size(), format, quant_min, quant_max);
    });
  }

  bool capture_step(const Tensor& input, const Tensor& scale, const Optional& zero_point, const Optional& minval,
                    const Optional& running_min, const Optional& running_max, bool has_running, const Tensor& config) {
    return add(
        "coreai_kernels::observe_and_fake_quantize_", input, {scale, zero_point, minval, running_min, running_max}, [&] {
          return functions(input).step(
              handle_of(input),
              {handle_of(scale), handle_of(zero_point), handle_of(minval), handle_of(running_min), handle_of(running_max)},
              has_running, handle_of(config));
        });
  }

 private:
  // Inputs of so many kinds; the one captured first goes when there are more.
  static constexpr size_t kMost = 16;

  static py::object miss(Miss reason) {
    ++counters.misses[static_cast<size_t>(reason)];
    return py::none();
  }

  template <class Capture>
  bool add(const char* name, const Tensor& input, const std::vector<Optional>& state, Capture capture) {
    const auto suits = [&](const Optional& x) {
      return !x || (is_plain(*x) && x->is_contiguous() && x->device() == input.device());
    };
    if (!can_capture_ || !can_capture(input) || !is_plain_eager() || !is_plain(input) ||
        !std::all_of(state.begin(), state.end(), suits))
      return false;
    std::unique_ptr<CapturedCall> call;
    {
      const at::AutoDispatchBelowAutograd nothing_recorded;
      call.reset(capture());
    }
    if (!call) return false;
    if (entries_.size() == kMost) entries_.erase(entries_.begin());
    entries_.push_back(std::make_shared<const Entry>(name, input, std::move(call)));
    return true;
  }

  bool can_capture_;
  Guard guard_;
  std::vector<std::shared_ptr<const Entry>> entries_;
};

py::dict counts() {
  py::dict misses;
  for (size_t i = 0; i < kMissNames.size(); ++i) misses[kMissNames[i]] = counters.misses[i];
  py::dict all;
  all["hits"] = counters.hits;
  all["misses"] = misses;
  return all;
}

}  // namespace
}  // namespace coreai

PYBIND11_MODULE(_C_autograd, module) {
  using coreai::CapturedCalls;
  module.doc() = "Autograd's side of coreai_kernels in eager mode. Importing it registers nodes with torch's dispatcher.";
  namespace py = pybind11;
  py::class_<CapturedCalls>(module, "CapturedCalls", "See coreai_kernels/runtime/captured.py.")
      .def(py::init<const std::vector<std::pair<py::dict, py::str>>&, const std::vector<at::Tensor>&,
                    const std::vector<py::dict>&, const std::vector<py::type>&>(),
           py::arg("slots"), py::arg("switches"), py::arg("hooks"), py::arg("classes"))
      .def("__call__", &CapturedCalls::call, py::arg("input"))
      .def("is_valid", &CapturedCalls::is_valid)
      .def("capture_simulation", &CapturedCalls::capture_simulation)
      .def("capture_step", &CapturedCalls::capture_step);
  module.def("can_capture", &coreai::can_capture, "Whether calls with a tensor of its device may be captured.");
  module.def(
      "use_cuda",
      [](uintptr_t functions) { coreai::cuda_functions = reinterpret_cast<coreai::CaptureFunctions*>(functions); },
      py::arg("functions"), "Capture calls of CUDA tensors, too: by what coreai_cuda_capture_functions() returns.");
  module.def("counts", &coreai::counts, "Hits and misses of all captured calls.");
  module.def("reset_counts", [] { coreai::counters = {}; });
}
