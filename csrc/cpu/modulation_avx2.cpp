#define AAR_ISA isa_avx2
#include "modulation_kernels.h"

AAR_DEFINE_MODULATION(avx2)
