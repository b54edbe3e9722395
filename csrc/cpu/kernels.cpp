// The table of kernels of the instruction set in use.
#include "cpu/kernels.h"

#include "cpu/dispatch.h"

namespace coreai::cpu {

const Kernels& kernels() {
  switch (isa()) {
#if defined(COREAI_HAVE_NEON)
    case Isa::neon:
      return neon::kKernels;
#endif
#if defined(COREAI_HAVE_AVX512)
    case Isa::avx512:
      return avx512::kKernels;
#endif
#if defined(COREAI_HAVE_AVX2)
    case Isa::avx2:
      return avx2::kKernels;
#endif
    default:
      return generic::kKernels;
  }
}

}  // namespace coreai::cpu
