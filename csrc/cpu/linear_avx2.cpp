#define AAR_ISA isa_avx2
#include "linear_kernels.h"

AAR_DEFINE_LINEAR(avx2)
