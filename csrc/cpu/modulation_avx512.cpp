#define AAR_ISA isa_avx512
#include "modulation_kernels.h"

AAR_DEFINE_MODULATION(avx512)
