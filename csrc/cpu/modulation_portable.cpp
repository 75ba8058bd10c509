#define AAR_ISA isa_portable
#include "modulation_kernels.h"

AAR_DEFINE_MODULATION(portable)
