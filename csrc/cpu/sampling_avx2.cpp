#define AAR_ISA isa_avx2
#include "sampling_kernels.h"

AAR_DEFINE_SAMPLING(avx2)
