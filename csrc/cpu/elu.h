// ELU with alpha 1, on vectors.
#pragma once
#include <initializer_list>

#include "simd.h"

namespace aar {
namespace AAR_ISA {

// x where x > 0, else e^x - 1, within 2 ulp also near zero: e^x - 1 = 2^n q + (2^n - 1) where e^r = 1 + q, and n is 0
// there. The sum of both for x limited to their sides, where the other is 0. NaN stays NaN.
inline Floats elu(Floats x) {
  const Floats positive = max(splat(0.0f), x), limited = max(x - positive, splat(-87.0f));
  const Floats magic = splat(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer, which lies in the low bits
  const Floats shifted = fma(limited, splat(1.44269504f), magic), n = shifted - magic;
  const Floats r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), limited));
  Floats p = splat(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = fma(p, r, splat(c));
  const Floats q = fma(p, r * r, r), power = (Floats)(((Ints)shifted << 23) + 0x3f800000);
  return positive + fma(power, q, power - splat(1.0f));
}

inline void elu(const float* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, elu(load(x + i)));
  if (i < n) {
    float lanes[kLanes];
    store(lanes, elu(load_part(x + i, n - i)));
    std::memcpy(out + i, lanes, (n - i) * sizeof(float));
  }
}

}  // namespace AAR_ISA
}  // namespace aar
