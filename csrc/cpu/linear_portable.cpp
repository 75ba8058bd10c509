#define AAR_ISA isa_portable
#include "linear_kernels.h"

AAR_DEFINE_LINEAR(portable)
