#include "cpu/huge_pages.h"

#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace coreai::cpu {
namespace {

// From this size on glibc maps every allocation anew. Smaller ones mostly get memory that has been touched before,
// where the call only costs time.
constexpr int64_t kSmallest = int64_t{32} << 20;
constexpr uintptr_t kPage = 4096;

bool wanted() {
  const char* value = std::getenv("COREAI_HUGE_PAGES");
  return value == nullptr || std::strcmp(value, "0") != 0;
}

}  // namespace

void advise_huge_pages([[maybe_unused]] void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  static const bool enabled = wanted();
  if (bytes < kSmallest || !enabled) return;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  // Refused where the kernel is built without them: then the memory is as it was.
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)bytes;
#endif
}

}  // namespace coreai::cpu
