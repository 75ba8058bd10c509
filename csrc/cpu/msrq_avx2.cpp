#define AAR_ISA isa_avx2
#include "msrq_kernels.h"

AAR_DEFINE_MSRQ(avx2)
