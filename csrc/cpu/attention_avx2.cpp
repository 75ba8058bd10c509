#define AAR_ISA isa_avx2
#include "attention_kernels.h"

AAR_DEFINE_ATTENTION(avx2)
