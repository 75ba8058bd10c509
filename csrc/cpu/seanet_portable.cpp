#define AAR_ISA isa_portable
#include "seanet_kernels.h"

AAR_DEFINE_SEANET(portable)
