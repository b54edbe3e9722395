#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(COREAI_HAVE_AVX2) || defined(COREAI_HAVE_AVX512)
#include <cpuid.h>
#endif

namespace coreai::cpu {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512"};

const char* name(Level level) { return kNames[static_cast<int>(level)]; }

#if defined(COREAI_HAVE_AVX2) || defined(COREAI_HAVE_AVX512)
// Not every compiler that builds this knows "f16c" as a name for __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
#endif

Level best() {
#if defined(COREAI_HAVE_AVX512)
  if (has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return Level::avx512;
  }
#endif
#if defined(COREAI_HAVE_AVX2)
  if (has_avx2()) return Level::avx2;
#endif
  return Level::generic;
}

bool compiled(Level level) {
  switch (level) {
    case Level::generic:
      return true;
    case Level::avx2:
#if defined(COREAI_HAVE_AVX2)
      return true;
#else
      return false;
#endif
    case Level::avx512:
#if defined(COREAI_HAVE_AVX512)
      return true;
#else
      return false;
#endif
  }
  return false;
}

Level choose() {
  const Level limit = best();
  const char* wanted = std::getenv("COREAI_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return limit;
  for (const Level level : {Level::generic, Level::avx2, Level::avx512}) {
    if (std::string(wanted) != name(level)) continue;
    if (!compiled(level)) {
      throw std::runtime_error("COREAI_CPU_CAPABILITY=" + std::string(wanted) +
                               ": this build has no code for that instruction set; unset the variable");
    }
    if (level > limit) {
      throw std::runtime_error("COREAI_CPU_CAPABILITY=" + std::string(wanted) +
                               ": this CPU lacks that instruction set; the best it runs is " + name(limit));
    }
    return level;
  }
  throw std::runtime_error("COREAI_CPU_CAPABILITY=" + std::string(wanted) +
                           ": unknown; use generic, avx2 or avx512, or unset the variable");
}

}  // namespace

Level level() {
  static const Level chosen = choose();
  return chosen;
}

const char* capability() { return name(level()); }

}  // namespace coreai::cpu
