// Work on torch's threads, for files that serve every instruction set. (Those of one have their own, in loops.h.)
#pragma once

#include "cpu/kernels.h"

namespace coreai::cpu {

// body(begin, end) over [0, count), `grain` items or more at a time.
template <class Body>
void parallel_for(int64_t count, int64_t grain, Body body) {
  if (count <= grain || threads() == 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  parallel(
      0, count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<Body*>(context))(begin, end); }, &body);
}

}  // namespace coreai::cpu
