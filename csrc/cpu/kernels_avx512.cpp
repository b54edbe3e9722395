#define COREAI_ISA avx512
#include "cpu/simd_avx512.h"
#include "cpu/table.h"
