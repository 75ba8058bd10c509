// How numbers are stored; kernels compute in fp32.
#pragma once

namespace aar {

enum class Element { float32, bfloat16, float16 };

}  // namespace aar
