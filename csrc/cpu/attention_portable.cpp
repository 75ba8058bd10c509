#define AAR_ISA isa_portable
#include "attention_kernels.h"

AAR_DEFINE_ATTENTION(portable)
