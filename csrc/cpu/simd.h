// One vector type per instruction set, chosen by the flags of the translation unit. Everything below lives in a
// namespace of the instruction set, so that the linker never takes one unit's code for another's.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#if defined(AAR_HAVE_X86)
#include <immintrin.h>
#endif

namespace aar {
namespace AAR_ISA {

#if defined(AAR_LANES) && !defined(__AVX2__)  // a width that the machine need not have, for tests of the tiling
constexpr int kLanes = AAR_LANES;
constexpr int kRegisters = 32;
#elif defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef int16_t Shorts __attribute__((vector_size(2 * kLanes)));
typedef int64_t Longs __attribute__((vector_size(4 * kLanes)));

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Ints load_ints(const void* p) {
  Ints v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
inline Floats splat(float x) { return x - Floats{}; }
inline void store_ints(void* p, Ints v) { std::memcpy(p, &v, sizeof v); }
inline void store_shorts(void* p, Ints v) {
  const Shorts s = __builtin_convertvector(v, Shorts);
  std::memcpy(p, &s, sizeof s);
}
inline void store_shorts(void* p, Floats v) { store_shorts(p, __builtin_convertvector(v, Ints)); }
inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
// Keeps the order in which v and what depends on it are computed, which is nothing to the compiler.
inline void stay([[maybe_unused]] Floats& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__AVX2__)
  asm("" : "+x"(v));
#endif
}
// b where either is NaN.
inline Floats max(Floats a, Floats b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);  // GCC would make a comparison and a blend
#else
  return a > b ? a : b;
#endif
}

// The first `count` lanes of p, `fill` behind: how loops treat the end of a row without reading beyond it.
inline Floats load_part(const float* p, int64_t count, float fill = 0.0f) {
  float lanes[kLanes];
  for (float& lane : lanes) lane = fill;
  for (int64_t i = 0; i < count && i < kLanes; i++) lanes[i] = p[i];
  return load(lanes);
}
inline float max_lane(Floats v) {
  float best = v[0];
  for (int i = 1; i < kLanes; i++) best = v[i] > best ? v[i] : best;
  return best;
}
inline float sum_lanes(Floats v) {
  float sum = v[0];
  for (int i = 1; i < kLanes; i++) sum += v[i];
  return sum;
}

// Lane i of the result is lane index[i] of a, or lane index[i] - kLanes of b.
inline Floats shuffle(Floats a, Floats b, Ints index) {
#if defined(__clang__)
  Floats out;
  for (int i = 0; i < kLanes; i++) out[i] = index[i] < kLanes ? a[index[i]] : b[index[i] - kLanes];
  return out;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// The sum in the order of a tree: in fewer dependent steps than `sum_lanes`, rounded another way.
template <int HALF = kLanes / 2>
inline float tree_sum(Floats v) {
  if constexpr (HALF == 0) {
    return v[0];
  } else {
    Ints index;
    for (int i = 0; i < kLanes; i++) index[i] = (i + HALF) % kLanes;
    return tree_sum<HALF / 2>(v + shuffle(v, v, index));
  }
}

// Lanes of a and b, of which those that HIGH asks for change places. Indices are constants, or else GCC computes them.
template <int BIT, bool HIGH, int... LANE>
inline Floats exchange(Floats a, Floats b, std::integer_sequence<int, LANE...>) {
  return shuffle(a, b, Ints{((LANE & BIT) != 0 ? kLanes + LANE - (HIGH ? 0 : BIT) : LANE + (HIGH ? BIT : 0))...});
}

// rows[i][j] becomes rows[j][i]: in log2(kLanes) rounds, each of which exchanges one bit of i and j.
template <int BIT = 1>
inline void transpose(Floats (&rows)[kLanes]) {
  if constexpr (BIT < kLanes) {
    constexpr std::make_integer_sequence<int, kLanes> lanes;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) {
      if ((i & BIT) != 0) continue;
      const Floats a = rows[i], b = rows[i + BIT];
      rows[i] = exchange<BIT, false>(a, b, lanes);
      rows[i + BIT] = exchange<BIT, true>(a, b, lanes);
    }
    transpose<BIT * 2>(rows);
  }
}

// e^x for x <= 0, within 2 units in the last place; 0 below -87.3, where the result leaves the normal numbers.
inline Floats exp(Floats x) {
  // Cephes' expf: x = n ln 2 + r, a polynomial of r, and n added to the exponent. 1.5 * 2^23 rounds to an integer.
  const Floats magic = splat(12582912.0f), shifted = fma(x, splat(1.44269504f), magic), n = shifted - magic;
  const Floats r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  const float terms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  Floats y = splat(1.9875691500e-4f);
  for (float term : terms) y = fma(y, r, splat(term));
  y = fma(y, r * r, r) + splat(1.0f);
  const Ints exponent = ((Ints)shifted + 127) << 23;
  return x < splat(-87.3f) ? splat(0.0f) : y * (Floats)exponent;
}

// Bit i is set where a[i] >= b[i].
inline uint32_t mask_ge(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; i++) bits |= uint32_t(a[i] >= b[i]) << i;
  return bits;
#endif
}

// Sums of integers that are not negative, in 64 bits: add_halves adds pairs of lanes.
inline Longs add_halves(Ints v) { return ((Longs)v & 0xFFFFFFFF) + ((Longs)v >> 32); }
inline int64_t sum_lanes(Longs v) {
  int64_t sum = v[0];
  for (int i = 1; i < kLanes / 2; i++) sum += v[i];
  return sum;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// For each set of eight lanes their numbers, one after the other.
struct Compress {
  uint8_t lanes[256][8] = {};
  constexpr Compress() {
    for (int bits = 0; bits < 256; bits++)
      for (int i = 0, n = 0; i < 8; n += bits >> i & 1, i++) lanes[bits][n] = uint8_t(i);
  }
};
constexpr Compress kCompress;
#endif

// Writes the lanes of v whose bit is set one after the other, and up to a whole vector of anything behind them.
inline void compress(void* out, uint32_t bits, Ints v) {
#if defined(__AVX512F__)
  const Ints packed = (Ints)_mm512_maskz_compress_epi32(__mmask16(bits), (__m512i)v);
#elif defined(__AVX2__)
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)kCompress.lanes[bits]));
  const Ints packed = (Ints)_mm256_permutevar8x32_epi32((__m256i)v, lanes);
#else
  Ints packed = v;
  for (int i = 0, n = 0; i < kLanes; n += bits >> i & 1, i++) packed[n] = v[i];
#endif
  std::memcpy(out, &packed, sizeof packed);
}

// sum + a.even * b.even + a.odd * b.odd over the 16-bit halves of each 32-bit lane.
inline Ints dot_pairs(Ints sum, Ints a, Ints b) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Scratch memory of a call: aligned, grown once, freed with the object.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 127) / 64 * 64))) {
    if (data_ == nullptr) std::abort();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }
  T* get() const { return data_; }

 private:
  T* data_;
};

}  // namespace AAR_ISA
}  // namespace aar
