#define AAR_ISA isa_portable
#include "sampling_kernels.h"

AAR_DEFINE_SAMPLING(portable)
