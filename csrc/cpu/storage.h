// Rows of numbers as they are stored, to and from fp32.
#pragma once
#include <bit>

#include "simd.h"

namespace aar {
namespace AAR_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline float widen(Float16 x) {
  // A factor moves the exponent to its place, and makes subnormal numbers normal.
  const float magnitude = std::bit_cast<float>(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 65536.0f ? 0x7f800000 : 0, sign = uint32_t(x.bits & 0x8000) << 16;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | special | sign);
}

// To the nearest, ties to even.
inline void narrow(float x, BFloat16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out.bits = uint16_t(x == x ? rounded : bits >> 16 | 0x40);
}
inline void narrow(float x, Float16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  const float size = std::bit_cast<float>(magnitude);
  uint32_t half = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  // The last digit of 0.5 + x is that of a subnormal half.
  if (size < 0x1p-14f) half = std::bit_cast<uint32_t>(size + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  if (size >= 65520.0f) half = 0x7c00;
  if (x != x) half = 0x7e00;
  out.bits = uint16_t(half | (bits >> 16 & 0x8000));
}

// kLanes numbers as floats.
inline Floats load(const BFloat16* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  Ints bits;
  for (int i = 0; i < kLanes; i++) bits[i] = int32_t(uint32_t(p[i].bits) << 16);
  return (Floats)bits;
#endif
}

inline void load_row(const float* in, int64_t n, float* out) { std::memcpy(out, in, sizeof(float) * n); }
inline void load_row(const BFloat16* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i++) out[i] = widen(in[i]);
}
inline void load_row(const Float16* in, int64_t n, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
  for (; i < n; i++) out[i] = widen(in[i]);
}

inline void store_row(const float* in, int64_t n, float* out) { std::memcpy(out, in, sizeof(float) * n); }
inline void store_row(const float* in, int64_t n, BFloat16* out) {
  for (int64_t i = 0; i < n; i++) narrow(in[i], out[i]);
}
inline void store_row(const float* in, int64_t n, Float16* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; i++) narrow(in[i], out[i]);
}

}  // namespace AAR_ISA
}  // namespace aar
