// The extension module. Loading it runs the operator registrations of the other files; its own functions
// only tell what was built. In CPython's limited API, so that one file serves every Python from 3.11 on; those without a GIL
// have no such API.
#include <pyconfig.h>
#ifndef Py_GIL_DISABLED
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>

#include <exception>
#include <string>

#include "cpu/dispatch.h"
#include "ops/captured.h"

// Given by the build: instruction sets, torch version compiled against, CUDA architectures.
#if !defined(COREAI_ISAS) || !defined(COREAI_TORCH_VERSION) || !defined(COREAI_CUDA_ARCHS)
#error "build this file with setup.py"
#endif

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

// What `run` returns; RuntimeError instead of an exception of C++.
template <class Run>
PyObject* guarded(Run run) {
  try {
    return run();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s,s:K,s:s}", "compiler", kCompiler, "cpu_isas", COREAI_ISAS, "torch_version",
                       COREAI_TORCH_VERSION, "torch_target_version", static_cast<unsigned long long>(TORCH_TARGET_VERSION),
                       "cuda_archs", COREAI_CUDA_ARCHS);
}

PyObject* cpu_capability(PyObject*, PyObject*) {
  return guarded([] { return Py_BuildValue("s", std::string(coreai::cpu::capability()).c_str()); });
}

PyObject* set_cpu_capability(PyObject*, PyObject* name) {
  const char* text = PyUnicode_AsUTF8AndSize(name, nullptr);
  if (text == nullptr) return nullptr;
  return guarded([&] {
    coreai::cpu::set_capability(text);
    return Py_BuildValue("");
  });
}

PyMethodDef methods[] = {
    {"build_info", &build_info, METH_NOARGS, "Compiler, instruction sets, torch version and CUDA architectures built."},
    {"cpu_capability", &cpu_capability, METH_NOARGS,
     "Instruction set in use. RuntimeError if COREAI_CPU_CAPABILITY asks for one that cannot run."},
    {"set_cpu_capability", &set_cpu_capability, METH_O,
     "Choose the instruction set of calls that begin from now on. RuntimeError if it cannot run."},
    {},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "Native CPU kernels of coreai_kernels. Importing it registers them with torch's dispatcher.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
#ifdef Py_GIL_DISABLED
  PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
  void* functions = const_cast<coreai::CaptureFunctions*>(coreai::capture_functions());
  PyObject* capsule = PyCapsule_New(functions, coreai::kCaptureCapsule, nullptr);
  if (capsule == nullptr || PyModule_AddObjectRef(module, "capture_functions", capsule) < 0) {
    Py_XDECREF(capsule);
    Py_DECREF(module);
    return nullptr;
  }
  Py_DECREF(capsule);
  return module;
}
