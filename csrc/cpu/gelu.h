// GELU in its tanh form, on vectors.
#pragma once
#include "simd.h"

namespace aar {
namespace AAR_ISA {

// x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / 2 (1 + tanh u). Within 3 ulp.
inline Floats gelu_tanh(Floats x) {
  const Floats t = x * fma(x * x, splat(-2 * 0.7978845608f * 0.044715f), splat(-2 * 0.7978845608f));
  // exp(t) = 2^n exp(r). Below these bounds the result is x; above, zero.
  const Floats high = splat(88.0f), limited = max(splat(-87.0f), high < t ? high : t);
  const Floats magic = splat(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer, which lies in the low bits
  const Floats shifted = fma(limited, splat(1.44269504f), magic), n = shifted - magic;
  Floats r = fma(n, splat(-0.693359375f), limited);
  r = fma(n, splat(2.12194440e-4f), r);
  Floats p = splat(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = fma(p, r, splat(c));
  p = fma(p, r * r, r) + splat(1.0f);
  const Floats power = (Floats)(((Ints)shifted << 23) + 0x3f800000);
  return high < t ? x * splat(0.0f) : x / fma(p, power, splat(1.0f));
}

}  // namespace AAR_ISA
}  // namespace aar
