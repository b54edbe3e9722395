// Huge pages for large outputs.
#pragma once

#include <cstdint>

namespace coreai::cpu {

// Ask the system to back fresh memory with huge pages. Filling 64 MiB for the first time costs 16,384 page faults
// of 4 KiB, which take several times as long as quantizing it. A hint, and only about the memory given; without
// effect on less than 32 MiB, where the system knows no such pages, and with COREAI_HUGE_PAGES=0.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace coreai::cpu
