#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(COREAI_HAVE_AVX2) || defined(COREAI_HAVE_AVX512)
#include <cpuid.h>
#endif

namespace coreai::cpu {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "neon"};

const char* name(Isa isa) { return kNames[static_cast<int>(isa)]; }

#if defined(COREAI_HAVE_AVX2) || defined(COREAI_HAVE_AVX512)
// Not every compiler that builds this knows "f16c" as a name for __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
#endif

Isa best() {
#if defined(COREAI_HAVE_NEON)
  return Isa::neon;  // part of the architecture
#endif
#if defined(COREAI_HAVE_AVX512)
  if (has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return Isa::avx512;
  }
#endif
#if defined(COREAI_HAVE_AVX2)
  if (has_avx2()) return Isa::avx2;
#endif
  return Isa::generic;
}

bool compiled(Isa isa) {
  switch (isa) {
    case Isa::generic:
      return true;
    case Isa::avx2:
#if defined(COREAI_HAVE_AVX2)
      return true;
#else
      return false;
#endif
    case Isa::avx512:
#if defined(COREAI_HAVE_AVX512)
      return true;
#else
      return false;
#endif
    case Isa::neon:
#if defined(COREAI_HAVE_NEON)
      return true;
#else
      return false;
#endif
  }
  return false;
}

// The instruction set of that name. `who`: who asked for it, for messages.
Isa find(const std::string& wanted, const std::string& who) {
  for (const Isa isa : {Isa::generic, Isa::avx2, Isa::avx512, Isa::neon}) {
    if (wanted != name(isa)) continue;
    if (!compiled(isa)) throw std::runtime_error(who + ": this build has no code for that instruction set");
    if (isa > best()) {
      throw std::runtime_error(who + ": this CPU lacks that instruction set; the best it runs is " + name(best()));
    }
    return isa;
  }
  throw std::runtime_error(who + ": unknown; use generic, avx2, avx512 or neon");
}

Isa choose() {
  const char* wanted = std::getenv("COREAI_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return best();
  return find(wanted, "COREAI_CPU_CAPABILITY=" + std::string(wanted));
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa = choose();
  return isa;
}

}  // namespace

Isa isa() { return chosen().load(std::memory_order_relaxed); }

const char* capability() { return name(isa()); }

void set_capability(const std::string& wanted) { chosen() = find(wanted, "instruction set '" + wanted + "'"); }

}  // namespace coreai::cpu
