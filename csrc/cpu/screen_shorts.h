// Scores of all codes from roundings to 16 bits.
//
// Rows and codes are rounded to integers of up to 16 bits, small enough that dot products of `dim` terms are exact in
// 32 bits. A pair costs half an instruction's worth of an fp32 FMA (half the bytes too), and its error is bounded by
// Cauchy-Schwarz: |z.e - z'.e'| <= |z - z'| |e| + |z'| |e - e'|.
#pragma once
#include <cmath>
#include <algorithm>
#include <limits>

#include "aar/msrq.h"
#include "simd.h"

namespace aar {
namespace AAR_ISA {

constexpr int kBlock = 32;  // codes in a block of the packed layouts
constexpr int kBlockVectors = kBlock / kLanes;
constexpr int kStepVectors = kBlockVectors < 2 ? 1 : 2;  // vectors of codes in a register tile
constexpr int kSearchRows = kRegisters == 32 ? 8 : kLanes == 4 ? 2 : 6;

inline int64_t padded(int64_t codes) { return (codes + kBlock - 1) / kBlock * kBlock; }
inline int64_t pairs(int64_t dim) { return (dim + 1) / 2; }

// The largest integer for which `dim` products of two of them, added up, stay within 32 bits.
inline float integer_range(int64_t dim) {
  const double range = std::floor(std::sqrt(2147483647.0 / double(2 * pairs(dim)))) - 1.0;
  return float(range < 32766.0 ? range : 32766.0);
}

inline Floats load_up_to(const float* p, int64_t count) { return count >= kLanes ? load(p) : load_part(p, count); }

inline float largest(const float* row, int64_t dim) {
  Floats most = splat(0.0f);
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Floats x = load_up_to(row + d, dim - d);
    most = max(most, max(x, -x));
  }
  return max_lane(most);
}

// The Euclidean norms of a rounded row and of what rounding has changed.
struct Rounded {
  float norm, error;
};

// Rounds row[dim] to integer multiples of `unit`: out[dim], filled up with zeros to a whole vector.
inline Rounded round_by(float unit, const float* row, int64_t dim, int16_t* out) {
  const Floats inverse = splat(1.0f / unit), magic = splat(12582912.0f);
  Floats norm2 = splat(0.0f), error2 = splat(0.0f);
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Floats x = load_up_to(row + d, dim - d);
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
    const Floats q = (x * inverse + magic) - magic, back = q * splat(unit);
    store_shorts(out + d, q);
    norm2 = fma(back, back, norm2);
    error2 = fma(x - back, x - back, error2);
  }
  return {std::sqrt(sum_lanes(norm2)), std::sqrt(sum_lanes(error2))};
}

// Rounds to integers up to `range` and returns the value of one unit.
inline float round_row(const float* row, int64_t dim, float range, int16_t* out, Rounded* rounded) {
  // The smallest normal number keeps an all-zero row, and one of denormals, from dividing by zero.
  const float wanted = largest(row, dim) / range, least = std::numeric_limits<float>::min();
  const float unit = wanted > least ? wanted : least;
  *rounded = round_by(unit, row, dim, out);
  return unit;
}

// One codebook in the forms that the search reads; see `Packed`.
struct Book {
  const int16_t* codes;
  const float *scale, *bias, *exact, *bound;
  const uint8_t* bytes;
  const int16_t* byte_bias;
};

constexpr int kShortest = 9;  // where `Packed::bound` has the least |e|

// Packs codes e[codes][dim], of which `bias` is known.
inline void pack_shorts(const float* e, const Shape& shape, int16_t* codes, float* scale, float* bias, float* bound) {
  const int64_t dim = shape.dim, half = pairs(dim), size = padded(shape.codes);
  const float range = integer_range(dim);
  Buffer<int16_t> rounded(2 * half + kLanes);
  bound[0] = bound[1] = bound[2] = 0.0f;
  bound[kShortest] = std::numeric_limits<float>::infinity();
  for (int64_t k = 0; k < size; k++) {
    int16_t* out = codes + (k / kBlock) * half * 2 * kBlock + (k % kBlock) * 2;
    if (k >= shape.codes) {
      for (int64_t p = 0; p < half; p++) out[p * 2 * kBlock] = out[p * 2 * kBlock + 1] = 0;
      scale[k] = 0.0f;
      bias[k] = std::numeric_limits<float>::infinity();
      continue;
    }
    Rounded norms;
    scale[k] = round_row(e + k * dim, dim, range, rounded, &norms);
    for (int64_t p = 0; p < half; p++) {
      out[p * 2 * kBlock] = rounded[2 * p];
      out[p * 2 * kBlock + 1] = rounded[2 * p + 1];
    }
    bound[0] = std::fmax(bound[0], norms.norm + norms.error);
    bound[1] = std::fmax(bound[1], norms.error);
    bound[kShortest] = std::fmin(bound[kShortest], norms.norm + norms.error);
    bound[2] = std::fmax(bound[2], bias[k]);
  }
}

// The largest difference between a screened score and z.e - bias, of the codes that may be nearest.
//
// A code more than four times as long as the row and the shortest code together is far from nearest, by more than
// rounding can hide while vectors lose less than a tenth of their length to it. Such codes do not count, else one of
// them would let all others pass.
inline float score_error(const Rounded& z, const Shape& shape, const float* bound) {
  const float root = std::sqrt(float(shape.dim)), least = std::numeric_limits<float>::min();
  const float norm = 1.0001f * (z.norm + z.error), reach = 4.0f * (norm + bound[kShortest]);
  const bool reaches = shape.cosine || shape.dim > 4096 || !(reach < bound[0]);
  const float longest = reaches ? bound[0] : reach;
  const float rounding = 0.501f * root * (longest / integer_range(shape.dim) + least);
  const float bias = reaches ? bound[2] : 0.5001f * longest * longest;
  const float inexact = z.error * longest + z.norm * (rounding < bound[1] ? rounding : bound[1]);
  return inexact + 0x1p-21f * (z.norm * longest + bias);
}

// Screened scores z.e - bias, in units of each row's rounding: larger is nearer. best[r] is the largest.
// Not inlined: among its callers' variables the compiler spills the accumulators, which costs half the speed.
template <int ROWS>
__attribute__((noinline)) void screen(const int16_t* z, int64_t half, const float* per_unit, const Book& book,
                                      int64_t size, float* scores, float* best) {
  Floats top[ROWS];
  for (int r = 0; r < ROWS; r++) top[r] = splat(-std::numeric_limits<float>::infinity());
  for (int64_t block = 0; block < size; block += kBlock) {
    for (int part = 0; part < kBlockVectors; part += kStepVectors) {
      const int16_t* codes = book.codes + block * 2 * half + part * 2 * kLanes;
      Ints sum[ROWS][kStepVectors] = {};
      for (int64_t p = 0; p < half; p++) {
        Ints e[kStepVectors];
        for (int v = 0; v < kStepVectors; v++) e[v] = load_ints(codes + p * 2 * kBlock + v * 2 * kLanes);
        for (int r = 0; r < ROWS; r++) {
          int32_t pair;
          std::memcpy(&pair, z + (r * half + p) * 2, sizeof pair);
          const Ints x = pair - Ints{};
          for (int v = 0; v < kStepVectors; v++) sum[r][v] = dot_pairs(sum[r][v], x, e[v]);
        }
      }
      for (int v = 0; v < kStepVectors; v++) {
        const int64_t k = block + (part + v) * kLanes;
        const Floats scale = load(book.scale + k), bias = load(book.bias + k);
        for (int r = 0; r < ROWS; r++) {
          const Floats score = fma(to_floats(sum[r][v]), scale, -(bias * splat(per_unit[r])));
          store(scores + r * size + k, score);
          top[r] = max(top[r], score);
        }
      }
    }
  }
  for (int r = 0; r < ROWS; r++) best[r] = max_lane(top[r]);
}

}  // namespace AAR_ISA
}  // namespace aar
