// The extension module. Loading it runs the operator registrations of the other files; its own functions
// only tell what was built.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/dispatch.h"
#include "ops/captured.h"

// Given by the build: instruction sets, torch version compiled against, CUDA architectures.
#if !defined(COREAI_ISAS) || !defined(COREAI_TORCH_VERSION) || !defined(COREAI_CUDA_ARCHS)
#error "build this file with setup.py"
#endif

namespace {

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = compiler();
  info["cpu_isas"] = COREAI_ISAS;
  info["torch_version"] = COREAI_TORCH_VERSION;
  info["torch_target_version"] = static_cast<unsigned long long>(TORCH_TARGET_VERSION);
  info["cuda_archs"] = COREAI_CUDA_ARCHS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native CPU kernels of coreai_kernels. Importing it registers them with torch's dispatcher.";
  module.def("build_info", &build_info, "Compiler, instruction sets, torch version and CUDA architectures built.");
  module.def("cpu_capability", &coreai::cpu::capability,
             "Instruction set in use. RuntimeError if COREAI_CPU_CAPABILITY asks for one that cannot run.");
  module.def("set_cpu_capability", &coreai::cpu::set_capability, pybind11::arg("name"),
             "Choose the instruction set of calls that begin from now on. RuntimeError if it cannot run.");
  module.attr("capture_functions") = pybind11::capsule(coreai::capture_functions(), coreai::kCaptureCapsule);
}
