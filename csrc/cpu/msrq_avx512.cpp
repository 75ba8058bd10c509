#define AAR_ISA isa_avx512
#include "msrq_kernels.h"

AAR_DEFINE_MSRQ(avx512)
