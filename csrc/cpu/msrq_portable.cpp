#define AAR_ISA isa_portable
#include "msrq_kernels.h"

AAR_DEFINE_MSRQ(portable)
