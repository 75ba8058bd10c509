// Picks the instruction set once, by what the CPU and the operating system support. AAR_KERNELS_ISA overrides it.
#include "aar/isa.h"

#include <cstdlib>
#include <string>

namespace aar {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};
#if defined(AAR_HAVE_X86)
constexpr int kBuilt = 3;
#else
constexpr int kBuilt = 1;
#endif

bool runs(int level) {
#if defined(AAR_HAVE_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  return level == 0 || (level == 1 && avx2) || (level == 2 && avx512);
#else
  return level == 0;
#endif
}

Isa pick() {
  const char* variable = std::getenv("AAR_KERNELS_ISA");
  const std::string wanted = variable == nullptr ? "" : variable;
  for (int level = kBuilt - 1; level > 0; level--) {
    // A level that the CPU lacks would end the process, so asking for one takes the next best instead.
    if (runs(level) && (wanted.empty() || wanted == kNames[level])) return Isa(level);
  }
  return Isa::portable;
}

}  // namespace

Isa isa() {
  static const Isa chosen = pick();
  return chosen;
}

const char* isa_report() {
  static const std::string report = [] {
    std::string built, detected;
    for (int level = 0; level < kBuilt; level++) {
      const std::string comma = level == 0 ? "" : ",";
      built += comma + kNames[level];
      if (runs(level)) detected += comma + kNames[level];
    }
    return "built=" + built + ";detected=" + detected + ";active=" + kNames[int(isa())];
  }();
  return report.c_str();
}

}  // namespace aar
