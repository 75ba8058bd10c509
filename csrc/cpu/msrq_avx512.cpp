#define AAR_ISA isa_avx512
#include "msrq_kernels.h"

AAR_DEFINE_KERNELS(kernels_avx512, "avx512")
