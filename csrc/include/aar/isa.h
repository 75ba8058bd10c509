// Instruction sets: each kernel is compiled once per level, and the level is picked once by what the CPU has.
#pragma once

namespace aar {

enum class Isa { portable, avx2, avx512 };

Isa isa();                 // the best level of this CPU, or the one that AAR_KERNELS_ISA names
const char* isa_report();  // "built=portable,avx2,avx512;detected=...;active=..."

}  // namespace aar

// Declares the tables `name_portable`, `name_avx2`... that the levels' files define, and `name()`, the one to use.
#if defined(AAR_HAVE_X86)
#define AAR_LEVELS(Type, name)                                                  \
  extern const Type name##_portable, name##_avx2, name##_avx512;                \
  inline const Type& name() {                                                   \
    static const Type* const levels[] = {&name##_portable, &name##_avx2, &name##_avx512}; \
    return *levels[int(isa())];                                                 \
  }
#else
#define AAR_LEVELS(Type, name)   \
  extern const Type name##_portable; \
  inline const Type& name() { return name##_portable; }
#endif
