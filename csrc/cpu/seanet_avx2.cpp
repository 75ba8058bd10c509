#define AAR_ISA isa_avx2
#include "seanet_backward.h"

AAR_DEFINE_SEANET(avx2)
