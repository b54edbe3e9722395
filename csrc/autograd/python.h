// What the fast path needs of CPython and of torch's Python module.
//
// By CPython's own interface. pybind11, and torch's headers that include it, would take longer to compile than all the
// rest of the library, which is compiled for each torch and each Python; and its calls take more instructions.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>
#include <structmember.h>
#include <torch/csrc/Export.h>

#include <exception>
#include <string>
#include <utility>
#include <vector>

// As torch/csrc/autograd/python_variable.h and torch/csrc/Exceptions.h declare them.
TORCH_PYTHON_API extern PyObject* THPVariableClass;
TORCH_PYTHON_API extern PyObject* ParameterClass;
TORCH_PYTHON_API PyObject* THPVariable_Wrap(at::TensorBase&& tensor);
namespace torch {
TORCH_PYTHON_API void translate_exception_to_python(const std::exception_ptr& exception);
}

namespace coreai::python {

// Thrown where Python's error is set.
struct Error {};

inline void require(bool holds, const char* message) {
  if (holds) return;
  PyErr_SetString(PyExc_TypeError, message);
  throw Error();
}

// An owned reference; null for none. All but an empty one needs the GIL.
class Ref {
 public:
  Ref() = default;
  explicit Ref(PyObject* borrowed) : object_(Py_XNewRef(borrowed)) {}
  Ref(const Ref& other) : Ref(other.object_) {}
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_ = nullptr;
};

// Lets other threads of Python run as long as it lives.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() { PyEval_RestoreThread(state_); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

// What body returns; `failed`, with Python's error set, if it throws.
template <class Result, class Body>
Result translated(Result failed, Body body) {
  try {
    return body();
  } catch (const Error&) {
    return failed;
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
    return failed;
  }
}

// How the object of a tensor begins; see check_layout().
struct TensorObject {
  PyObject_HEAD at::Tensor tensor;
};

inline const at::Tensor& tensor_of(PyObject* object) { return reinterpret_cast<TensorObject*>(object)->tensor; }

// Whether the object is a torch.Tensor or a torch.nn.Parameter, and of no other class derived from them.
inline bool is_exact_tensor(PyObject* object) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == THPVariableClass || type == ParameterClass;
}

inline bool is_tensor(PyObject* object) {
  if (is_exact_tensor(object)) return true;
  const int is = PyObject_IsInstance(object, THPVariableClass);
  if (is < 0) throw Error();
  return is != 0;
}

inline PyObject* wrapped(at::Tensor tensor) {
  PyObject* object = THPVariable_Wrap(std::move(tensor));
  if (object == nullptr) throw Error();
  return object;
}

// Throws if this torch has tensors lie in their objects differently from the torches that this was written for.
inline void check_layout(const at::Tensor& any) {
  PyObject* object = wrapped(any);
  const bool fits = tensor_of(object).unsafeGetTensorImpl() == any.unsafeGetTensorImpl();
  Py_DECREF(object);
  if (fits) return;
  PyErr_SetString(PyExc_ImportError, "objects of tensors are laid out differently in this torch");
  throw Error();
}

// Arguments of a method, by position.
class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t count, Py_ssize_t expected) : values_(values) {
    require(count == expected, "wrong number of arguments");
  }
  const at::Tensor& tensor(int i) const {
    require(is_tensor(values_[i]), "expected a tensor");
    return tensor_of(values_[i]);
  }
  // Undefined for None.
  at::Tensor optional_tensor(int i) const { return values_[i] == Py_None ? at::Tensor() : tensor(i); }
  double number(int i) const { return checked(PyFloat_AsDouble(values_[i])); }
  int64_t integer(int i) const { return checked(PyLong_AsLongLong(values_[i])); }
  bool flag(int i) const { return checked(PyObject_IsTrue(values_[i])) != 0; }
  std::vector<int64_t> integers(int i) const {
    require(PyTuple_Check(values_[i]) || PyList_Check(values_[i]), "expected a tuple or list of integers");
    std::vector<int64_t> result;
    for (Py_ssize_t at = 0; at < PySequence_Fast_GET_SIZE(values_[i]); ++at) {
      result.push_back(checked(PyLong_AsLongLong(PySequence_Fast_GET_ITEM(values_[i], at))));
    }
    return result;
  }

 private:
  template <class Number>
  static Number checked(Number value) {
    if (value == Number{-1} && PyErr_Occurred()) throw Error();
    return value;
  }

  PyObject* const* values_;
};

// The elements of a list or tuple, borrowed, of which `is` is true.
template <class Is>
std::vector<PyObject*> elements(PyObject* sequence, Is is, const char* expected) {
  require(PyTuple_Check(sequence) || PyList_Check(sequence), expected);
  std::vector<PyObject*> result;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(sequence); ++i) {
    result.push_back(PySequence_Fast_GET_ITEM(sequence, i));
    require(is(result.back()), expected);
  }
  return result;
}

}  // namespace coreai::python
