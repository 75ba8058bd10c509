// The library `aar_native` of operators; each other torch_*.cpp adds those of one operator folder.
#include "aar/isa.h"
#include "torch.h"

namespace {

std::string isa_report() { return aar::isa_report(); }

}  // namespace

STABLE_TORCH_LIBRARY(aar_native, m) { m.def("isa_report() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(aar_native, CompositeExplicitAutograd, m) { m.impl("isa_report", TORCH_BOX(&isa_report)); }
