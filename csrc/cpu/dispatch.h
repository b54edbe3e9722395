// Choice of instruction set at run time: one binary serves every CPU of its architecture.
#pragma once

namespace coreai::cpu {

// Ordered: a CPU that runs a level runs every level before it.
enum class Level { generic, avx2, avx512 };

// The best level that is both compiled and supported, or the one that COREAI_CPU_CAPABILITY names.
// Decided once. Throws std::runtime_error if that variable names a level that cannot run here.
Level level();

// Name of level(), e.g. "avx512".
const char* capability();

}  // namespace coreai::cpu
