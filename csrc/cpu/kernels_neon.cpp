#define COREAI_ISA neon
#include "cpu/simd_neon.h"
#include "cpu/table.h"
