#define AAR_ISA isa_avx512
#include "seanet_kernels.h"

AAR_DEFINE_SEANET(avx512)
