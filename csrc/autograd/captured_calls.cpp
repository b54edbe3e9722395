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

#include <array>
#include <atomic>
#include <cstddef>
#include <mutex>
#include <utility>

#include "autograd/nodes.h"
#include "autograd/python.h"
#include "ops/captured.h"

namespace coreai {
namespace {

using python::Ref;

// Why a call was not run from its capture. The names are what Python shows.
enum class Miss { kInput, kMode, kState, kMemory, kSwitch, kHook, kClass, kCount };
constexpr std::array<const char*, 7> kMissNames = {"input", "mode", "state", "memory", "switch", "hook", "class"};

// The GIL guards everything here but the kernels. Pythons without one have locks in their dictionaries, and here is another
// for what is not Python's.
#ifdef Py_GIL_DISABLED
using Mutex = std::mutex;
#else
struct Mutex {
  void lock() {}
  void unlock() {}
};
#endif

class Counter {
 public:
  void add() { count_.fetch_add(1, std::memory_order_relaxed); }
  void reset() { count_.store(0, std::memory_order_relaxed); }
  unsigned long long now() const { return count_.load(std::memory_order_relaxed); }

 private:
  std::atomic<unsigned long long> count_ = 0;
};
struct Counters {
  Counter hits;
  std::array<Counter, static_cast<size_t>(Miss::kCount)> misses;
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
  Slot(PyObject* owner, PyObject* key) : owner_(owner), key_(key), value_(taken()) {}
  bool holds() const { return now() == value_.get(); }
  PyObject* value() const { return value_.get(); }

 private:
  Ref taken() const {
#ifdef Py_GIL_DISABLED
    PyObject* value = nullptr;  // another thread may put something else in its place, and drop it
    if (PyDict_GetItemRef(owner_.get(), key_.get(), &value) < 0) throw python::Error();
    const Ref held(value == Py_None ? nullptr : value);
    Py_XDECREF(value);
    return held;
#else
    return Ref(now());
#endif
  }
  // To compare only: without a GIL nothing keeps the object.
  PyObject* now() const {
    PyObject* value = PyDict_GetItemWithError(owner_.get(), key_.get());
    return value == Py_None ? nullptr : value;
  }

  Ref owner_, key_, value_;
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

// A class whose attributes, with those of its bases, have to stay: Python renews the tag when any is assigned. What a
// slot holds of it must not get another class, either.
class Class {
 public:
  Class(PyObject* type, const std::vector<Slot>& slots) : type_(type), tag_(now()) {
    for (const Slot& slot : slots) {
      if (slot.value() && is_of(slot.value())) instances_.emplace_back(slot.value());
    }
  }
  bool holds() const {
    return tag_ != 0 && now() == tag_ &&
           std::all_of(instances_.begin(), instances_.end(), [this](PyObject* one) { return is_of(one); });
  }

 private:
  unsigned int now() const {
    return static_cast<unsigned int>(
        __atomic_load_n(&reinterpret_cast<PyTypeObject*>(type_.get())->tp_version_tag, __ATOMIC_RELAXED));
  }
  bool is_of(PyObject* object) const { return Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(type_.get()); }

  Ref type_;
  unsigned int tag_;
  std::vector<PyObject*> instances_;  // which the slots keep
};

// A dictionary of hooks that has to keep its entries. Torch numbers hooks: no two have the same key.
class Hooks {
 public:
  explicit Hooks(PyObject* hooks) : hooks_(hooks), keys_(now()) {}
  bool holds() const {
    return PyDict_GET_SIZE(hooks_.get()) == static_cast<Py_ssize_t>(keys_.size()) && (keys_.empty() || now() == keys_);
  }

 private:
  std::vector<Py_ssize_t> now() const {
    std::vector<Py_ssize_t> keys;
    Py_ssize_t at = 0;
#ifdef Py_GIL_DISABLED
    Py_BEGIN_CRITICAL_SECTION(hooks_.get());
#endif
    for (PyObject *key, *hook; PyDict_Next(hooks_.get(), &at, &key, &hook);) keys.push_back(PyLong_AsSsize_t(key));
#ifdef Py_GIL_DISABLED
    Py_END_CRITICAL_SECTION();
#endif
    return keys;
  }

  Ref hooks_;
  std::vector<Py_ssize_t> keys_;
};

template <class Conditions>
bool all_hold(const Conditions& conditions) {
  return std::all_of(conditions.begin(), conditions.end(), [](const auto& one) { return one.holds(); });
}

// Everything that an owner's captured calls depend on, but for their inputs.
class Guard {
 public:
  // Lists of pairs of a dictionary and a string, of tensors, of dictionaries, of classes.
  Guard(PyObject* slots, const std::vector<Tensor>& switches, PyObject* hooks, PyObject* classes) {
    const auto is_slot = [](PyObject* x) {
      return PyTuple_Check(x) && PyTuple_GET_SIZE(x) == 2 && PyDict_Check(PyTuple_GET_ITEM(x, 0)) &&
             PyUnicode_Check(PyTuple_GET_ITEM(x, 1));
    };
    for (PyObject* slot : python::elements(slots, is_slot, "slots must be a list of (dict, str)")) {
      slots_.emplace_back(PyTuple_GET_ITEM(slot, 0), PyTuple_GET_ITEM(slot, 1));
      PyObject* value = slots_.back().value();
      if (value && python::is_tensor(value)) places_.emplace_back(python::tensor_of(value));
    }
    for (const Tensor& one : switches) switches_.emplace_back(one);
    const auto is_dict = [](PyObject* x) { return PyDict_Check(x); };
    for (PyObject* one : python::elements(hooks, is_dict, "hooks must be a list of dict")) hooks_.emplace_back(one);
    const auto is_class = [](PyObject* x) { return PyType_Check(x); };
    for (PyObject* type : python::elements(classes, is_class, "classes must be a list of type")) {
      classes_.emplace_back(type, slots_);
    }
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
  static std::atomic<const void*> found = nullptr;
  if (found == nullptr) found = PyCapsule_Import(kCaptureCapsule, 0);
  if (found == nullptr) throw python::Error();
  return *static_cast<const CaptureFunctions*>(found.load());
}

// Of CUDA tensors, if the library for them is there.
std::atomic<const CaptureFunctions*> cuda_functions = nullptr;

bool can_capture(const Tensor& input) { return input.is_cpu() || (input.is_cuda() && cuda_functions); }

const CaptureFunctions& functions(const Tensor& input) { return input.is_cpu() ? cpu_functions() : *cuda_functions; }

// What a handle is: torch::aot_inductor::new_tensor_handle. Null for an undefined tensor.
AtenTensorHandle handle_of(const Tensor& tensor) {
  return tensor.defined() ? reinterpret_cast<AtenTensorHandle>(new Tensor(tensor)) : nullptr;
}

// Tensors of inference mode, which do not count how often they are written, are not plain.
bool is_switch(const Tensor& x) { return is_plain(x) && x.numel() == 1 && x.element_size() == 1; }

std::vector<Tensor> tensors_in(PyObject* sequence) {
  std::vector<Tensor> result;
  for (PyObject* one : python::elements(sequence, python::is_tensor, "switches must be a list of tensors")) {
    result.push_back(python::tensor_of(one));
  }
  return result;
}

// The captured calls of one owner, such as a fake quantizer: one guard, and a call for each kind of input.
class CapturedCalls {
 public:
  CapturedCalls(PyObject* slots, const std::vector<Tensor>& switches, PyObject* hooks, PyObject* classes)
      : can_capture_(std::all_of(switches.begin(), switches.end(), is_switch)),
        guard_(slots, can_capture_ ? switches : std::vector<Tensor>(), hooks, classes) {}

  // The output, a new reference; None if the call is not captured or something is not as it was.
  PyObject* call(PyObject* object) {
    if (!python::is_exact_tensor(object)) return miss(Miss::kInput);
    const Tensor& input = python::tensor_of(object);
    if (!is_plain(input) || has_tangent(input)) return miss(Miss::kInput);
    if (!is_plain_eager()) return miss(Miss::kMode);
    if (const Miss failure = guard_.failure(); failure != Miss::kCount) return miss(failure);
    const auto entry = find(input);
    if (!entry) return miss(Miss::kInput);
    counters.hits.add();
    Tensor output;
    {
      const python::Unlocked others_may_run;
      output = entry->run(input);
    }
    return python::wrapped(std::move(output));
  }

  bool is_valid() const { return guard_.failure() == Miss::kCount; }

  bool capture_simulation(const python::Arguments& args) {
    const Tensor &input = args.tensor(0), &scale = args.tensor(1);
    const Tensor zero_point = args.optional_tensor(2), minval = args.optional_tensor(3);
    const Ints block_size = args.integers(4);
    const int64_t format = args.integer(5);
    const double quant_min = args.number(6), quant_max = args.number(7);
    return add("coreai_kernels::fake_quantize_forward", input, {scale, zero_point, minval}, [&] {
      return functions(input).simulation(handle_of(input), {handle_of(scale), handle_of(zero_point), handle_of(minval)},
                                         block_size.data(), block_size.size(), format, quant_min, quant_max);
    });
  }

  bool capture_step(const python::Arguments& args) {
    const Tensor &input = args.tensor(0), &config = args.tensor(7);
    const variable_list state = {args.tensor(1), args.optional_tensor(2), args.optional_tensor(3), args.optional_tensor(4),
                                 args.optional_tensor(5)};
    const bool has_running = args.flag(6);
    return add("coreai_kernels::observe_and_fake_quantize_", input, state, [&] {
      return functions(input).step(
          handle_of(input),
          {handle_of(state[0]), handle_of(state[1]), handle_of(state[2]), handle_of(state[3]), handle_of(state[4])},
          has_running, handle_of(config));
    });
  }

 private:
  // Inputs of so many kinds; the one captured first goes when there are more.
  static constexpr size_t kMost = 16;

  static PyObject* miss(Miss reason) {
    counters.misses[static_cast<size_t>(reason)].add();
    return Py_NewRef(Py_None);
  }

  // Held by the caller, too: another thread may capture, and drop it.
  std::shared_ptr<const Entry> find(const Tensor& input) {
    const std::lock_guard<Mutex> alone(mutex_);
    for (const auto& entry : entries_) {
      if (entry->suits(input)) return entry;
    }
    return nullptr;
  }

  template <class Capture>
  bool add(const char* name, const Tensor& input, const variable_list& state, Capture capture) {
    const auto suits = [&](const Tensor& x) {
      return !x.defined() || (is_plain(x) && x.is_contiguous() && x.device() == input.device());
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
    std::shared_ptr<const Entry> dropped, entry = std::make_shared<const Entry>(name, input, std::move(call));
    const std::lock_guard<Mutex> alone(mutex_);
    if (entries_.size() == kMost) {
      dropped = std::move(entries_.front());
      entries_.erase(entries_.begin());
    }
    entries_.push_back(std::move(entry));
    return true;
  }

  bool can_capture_;
  Guard guard_;
  Mutex mutex_;
  std::vector<std::shared_ptr<const Entry>> entries_;
};

// The class of Python's that holds them. It is no part of a cycle: nothing that a guard holds leads to a module.
struct CallsObject {
  PyObject_HEAD vectorcallfunc call;
  CapturedCalls* calls;
};

CapturedCalls& calls_of(PyObject* self) { return *reinterpret_cast<CallsObject*>(self)->calls; }

PyObject* call(PyObject* self, PyObject* const* values, size_t count, PyObject* names) {
  return python::translated<PyObject*>(nullptr, [&] {
    python::require(PyVectorcall_NARGS(count) == 1 && names == nullptr, "expected one tensor");
    return calls_of(self).call(values[0]);
  });
}

PyObject* new_calls(PyTypeObject* type, PyObject* args, PyObject* keywords) {
  static const char* names[] = {"slots", "switches", "hooks", "classes", nullptr};
  PyObject *slots, *switches, *hooks, *classes;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOO:CapturedCalls", const_cast<char**>(names), &slots, &switches,
                                   &hooks, &classes))
    return nullptr;
  return python::translated<PyObject*>(nullptr, [&]() -> PyObject* {
    auto calls = std::make_unique<CapturedCalls>(slots, tensors_in(switches), hooks, classes);
    PyObject* self = type->tp_alloc(type, 0);
    if (self == nullptr) return nullptr;
    auto* object = reinterpret_cast<CallsObject*>(self);
    object->call = call;
    object->calls = calls.release();
    return self;
  });
}

void delete_calls(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<CallsObject*>(self)->calls;
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* is_valid(PyObject* self, PyObject*) { return PyBool_FromLong(calls_of(self).is_valid()); }

template <bool (CapturedCalls::*capture)(const python::Arguments&)>
PyObject* capture_by(PyObject* self, PyObject* const* values, Py_ssize_t count) {
  return python::translated<PyObject*>(
      nullptr, [&] { return PyBool_FromLong((calls_of(self).*capture)(python::Arguments(values, count, 8))); });
}

template <class Function>
PyCFunction as_method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef calls_methods[] = {{"is_valid", is_valid, METH_NOARGS, "Whether the guard holds."},
                               {"capture_simulation", as_method(capture_by<&CapturedCalls::capture_simulation>),
                                METH_FASTCALL, "Capture a call of fake_quantize_forward; whether that is possible."},
                               {"capture_step", as_method(capture_by<&CapturedCalls::capture_step>), METH_FASTCALL,
                                "Capture a call of observe_and_fake_quantize_; whether that is possible."},
                               {}};

PyMemberDef calls_members[] = {{"__vectorcalloffset__", T_PYSSIZET, offsetof(CallsObject, call), READONLY, nullptr}, {}};

PyType_Slot calls_slots[] = {{Py_tp_doc, const_cast<char*>("See coreai_kernels/runtime/captured.py.")},
                             {Py_tp_new, reinterpret_cast<void*>(new_calls)},
                             {Py_tp_dealloc, reinterpret_cast<void*>(delete_calls)},
                             {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
                             {Py_tp_methods, calls_methods},
                             {Py_tp_members, calls_members},
                             {}};

PyType_Spec calls_spec = {"coreai_kernels._C_autograd.CapturedCalls", sizeof(CallsObject), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_IMMUTABLETYPE, calls_slots};

PyObject* can_capture_object(PyObject*, PyObject* input) {
  return python::translated<PyObject*>(nullptr, [&] {
    python::require(python::is_tensor(input), "expected a tensor");
    return PyBool_FromLong(can_capture(python::tensor_of(input)));
  });
}

PyObject* use_cuda(PyObject*, PyObject* address) {
  void* const functions = PyLong_AsVoidPtr(address);
  if (functions == nullptr && PyErr_Occurred()) return nullptr;
  cuda_functions = static_cast<const CaptureFunctions*>(functions);
  return Py_NewRef(Py_None);
}

PyObject* counts(PyObject*, PyObject*) {
  PyObject* misses = PyDict_New();
  for (size_t i = 0; misses && i < kMissNames.size(); ++i) {
    PyObject* count = PyLong_FromUnsignedLongLong(counters.misses[i].now());
    if (count == nullptr || PyDict_SetItemString(misses, kMissNames[i], count) < 0) Py_CLEAR(misses);
    Py_XDECREF(count);
  }
  if (misses == nullptr) return nullptr;
  return Py_BuildValue("{sKsN}", "hits", counters.hits.now(), "misses", misses);
}

PyObject* reset_counts(PyObject*, PyObject*) {
  counters.hits.reset();
  for (Counter& one : counters.misses) one.reset();
  return Py_NewRef(Py_None);
}

PyMethodDef functions_of_module[] = {
    {"can_capture", can_capture_object, METH_O, "Whether calls with a tensor of its device may be captured."},
    {"use_cuda", use_cuda, METH_O,
     "Capture calls of CUDA tensors, too: by what coreai_cuda_capture_functions() returns. 0: no longer."},
    {"counts", counts, METH_NOARGS, "Hits and misses of all captured calls."},
    {"reset_counts", reset_counts, METH_NOARGS, "Set them to zero."},
    {}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_C_autograd",
                          "Autograd's side of coreai_kernels in eager mode. Importing it registers nodes with torch's "
                          "dispatcher.",
                          -1,
                          functions_of_module,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace
}  // namespace coreai

PyMODINIT_FUNC PyInit__C_autograd() {
  using namespace coreai;
  return python::translated<PyObject*>(nullptr, [&]() -> PyObject* {
    python::check_layout(at::detail::empty_cpu({0}, at::kFloat, false, std::nullopt));
    PyObject* module = PyModule_Create(&definition);
    PyObject* type = module ? PyType_FromSpec(&calls_spec) : nullptr;
#ifdef Py_GIL_DISABLED
    if (module) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
    const bool added = type && PyModule_AddObjectRef(module, "CapturedCalls", type) == 0;
    Py_XDECREF(type);
    if (!added) Py_CLEAR(module);
    return module;
  });
}
