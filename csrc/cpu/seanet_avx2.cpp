#define AAR_ISA isa_avx2
#include "seanet_kernels.h"

AAR_DEFINE_SEANET(avx2)
