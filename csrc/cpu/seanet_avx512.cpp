#define AAR_ISA isa_avx512
#include "seanet_backward.h"

AAR_DEFINE_SEANET(avx512)
