// Vectors of 16-bit lanes, and dot products of bytes in them.
#pragma once
#include "simd.h"

namespace aar {
namespace AAR_ISA {

constexpr int kHalfLanes = 2 * kLanes;

typedef int16_t Halves __attribute__((vector_size(4 * kLanes)));
typedef uint16_t UnsignedHalves __attribute__((vector_size(4 * kLanes)));
typedef int32_t WideInts __attribute__((vector_size(8 * kLanes)));

inline Halves load_halves(const int16_t* p) {
  Halves v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(int16_t* p, Halves v) { std::memcpy(p, &v, sizeof v); }
inline Halves splat_half(int16_t x) { return x - Halves{}; }

#if defined(__AVX512BW__)
inline Halves max(Halves a, Halves b) { return (Halves)_mm512_max_epi16((__m512i)a, (__m512i)b); }
// Sticks to the least number instead of wrapping around.
inline Halves subtract_saturated(Halves a, Halves b) { return (Halves)_mm512_subs_epi16((__m512i)a, (__m512i)b); }
// a * b / 2^15, rounded.
inline Halves multiply_fraction(Halves a, Halves b) { return (Halves)_mm512_mulhrs_epi16((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
inline Halves max(Halves a, Halves b) { return (Halves)_mm256_max_epi16((__m256i)a, (__m256i)b); }
inline Halves subtract_saturated(Halves a, Halves b) { return (Halves)_mm256_subs_epi16((__m256i)a, (__m256i)b); }
inline Halves multiply_fraction(Halves a, Halves b) { return (Halves)_mm256_mulhrs_epi16((__m256i)a, (__m256i)b); }
#else
inline Halves max(Halves a, Halves b) { return a > b ? a : b; }
inline Halves subtract_saturated(Halves a, Halves b) {
  const WideInts exact = __builtin_convertvector(a, WideInts) - __builtin_convertvector(b, WideInts);
  const WideInts least = -32768 - WideInts{};
  return __builtin_convertvector(exact > least ? exact : least, Halves);
}
inline Halves multiply_fraction(Halves a, Halves b) {
  const WideInts product = __builtin_convertvector(a, WideInts) * __builtin_convertvector(b, WideInts);
  return __builtin_convertvector((product + 0x4000) >> 15, Halves);
}
#endif

// Bit i is set where p[i] >= b[i], for 32 of them.
inline uint32_t mask_ge_32(const int16_t* p, Halves b) {
#if defined(__AVX512BW__)
  return _mm512_cmpge_epi16_mask((__m512i)load_halves(p), (__m512i)b);
#elif defined(__AVX2__)
  const Halves low = b > load_halves(p), high = b > load_halves(p + kHalfLanes);
  const __m256i less = _mm256_permute4x64_epi64(_mm256_packs_epi16((__m256i)low, (__m256i)high), 0xD8);
  return ~uint32_t(_mm256_movemask_epi8(less));
#else
  uint32_t bits = 0;
  for (int i = 0; i < 32; i++) bits |= uint32_t(p[i] >= b[0]) << i;
  return bits;
#endif
}

inline int16_t max_lane(Halves v) {
  int16_t best = v[0];
  for (int i = 1; i < kHalfLanes; i++) best = v[i] > best ? v[i] : best;
  return best;
}

// Bytes are multiplied in groups, unsigned by signed, and added up in a lane for each group. Sums may wrap around: they
// are right if what is left in the end fits the lane. Only pairs of products must fit 16 bits.
#if defined(__AVX512VNNI__)
constexpr int kGroup = 4;
typedef Ints ByteSums;
inline ByteSums dot_bytes(ByteSums sum, Ints a, Ints b) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
#else
constexpr int kGroup = 2;
typedef Halves ByteSums;
inline ByteSums dot_bytes(ByteSums sum, Ints a, Ints b) {
#if defined(__AVX2__)
  return (Halves)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)a, (__m256i)b));
#else
  const Halves even = ((Halves)a & 0xFF) * (((Halves)b << 8) >> 8);
  const Halves odd = (Halves)((UnsignedHalves)a >> 8) * ((Halves)b >> 8);
  return (Halves)((UnsignedHalves)sum + (UnsignedHalves)even + (UnsignedHalves)odd);
#endif
}
#endif

}  // namespace AAR_ISA
}  // namespace aar
