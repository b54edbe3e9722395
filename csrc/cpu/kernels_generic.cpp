#define COREAI_ISA generic
#include "cpu/simd_generic.h"
#include "cpu/table.h"
