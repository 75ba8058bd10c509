#define AAR_ISA isa_portable
#include "seanet_backward.h"

AAR_DEFINE_SEANET(portable)
