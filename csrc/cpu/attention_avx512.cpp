#define AAR_ISA isa_avx512
#include "attention_kernels.h"

AAR_DEFINE_ATTENTION(avx512)
