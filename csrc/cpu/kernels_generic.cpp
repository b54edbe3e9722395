#define COREAI_LEVEL generic
#include "cpu/simd_generic.h"
#include "cpu/table.h"
