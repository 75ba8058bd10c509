// Picks the instruction set once, by what the CPU and the operating system support. AAR_KERNELS_ISA overrides it.
#include <cstdlib>
#include <cstring>
#include <string>

#include "aar/msrq.h"

namespace aar {

extern const Kernels kernels_portable;
#if defined(AAR_HAVE_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace {

struct Level {
  const Kernels* kernels;
  bool runs;
};

// From the most to the least capable.
struct Levels {
  Level list[3];
  int count = 0;

  Levels() {
#if defined(AAR_HAVE_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    list[count++] = {&kernels_avx512, avx512};
    list[count++] = {&kernels_avx2, avx2};
#endif
    list[count++] = {&kernels_portable, true};
  }
};

const Levels& levels() {
  static const Levels value;
  return value;
}

void append(std::string& list, const char* name) {
  if (!list.empty()) list += ',';
  list += name;
}

const Kernels& pick() {
  const char* wanted = std::getenv("AAR_KERNELS_ISA");
  for (int i = 0; i < levels().count; i++) {
    const Level& level = levels().list[i];
    // A level that the CPU lacks would end the process, so asking for one takes the next best instead.
    if (level.runs && (wanted == nullptr || *wanted == 0 || std::strcmp(wanted, level.kernels->name) == 0))
      return *level.kernels;
  }
  return kernels_portable;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = pick();
  return chosen;
}

const char* isa_report() {
  static const std::string report = [] {
    std::string built, detected;
    for (int i = levels().count - 1; i >= 0; i--) {
      const Level& level = levels().list[i];
      append(built, level.kernels->name);
      if (level.runs) append(detected, level.kernels->name);
    }
    return "built=" + built + ";detected=" + detected + ";active=" + kernels().name;
  }();
  return report.c_str();
}

PackedSizes packed_sizes(const Shape& shape) {
  const int64_t size = (shape.codes + 31) / 32 * 32;
  return {shape.books * size * 2 * ((shape.dim + 1) / 2), shape.books * size,
          shape.cosine ? shape.books * shape.codes * shape.dim : 0, shape.books * 3};
}

}  // namespace aar
