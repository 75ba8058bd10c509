#define AAR_ISA isa_avx512
#include "sampling_kernels.h"

AAR_DEFINE_SAMPLING(avx512)
