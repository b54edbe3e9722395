// Choice of instruction set at run time: one binary serves every CPU of its architecture.
#pragma once

#include <string>

namespace coreai::cpu {

// Ordered: a CPU that runs one of these runs every one before it that is compiled for its architecture.
enum class Isa { generic, avx2, avx512, neon };

// The best instruction set that is both compiled and supported, or the one that COREAI_CPU_CAPABILITY names.
// Throws std::runtime_error if that variable names one that cannot run here.
Isa isa();

// Name of isa(), e.g. "avx512".
const char* capability();

// Choose another, for calls that begin from now on. Throws std::runtime_error if it cannot run here.
void set_capability(const std::string& wanted);

}  // namespace coreai::cpu
