#define AAR_ISA isa_avx512
#include "linear_kernels.h"

AAR_DEFINE_LINEAR(avx512)
