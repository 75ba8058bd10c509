// Nearest code of each row, exactly: screen with integers, then compare in double what they cannot tell apart.
//
// Rows and codes are rounded to integers of up to 16 bits, small enough that dot products of `dim` terms are exact in
// 32 bits. A pair costs half an instruction's worth of an fp32 FMA (half the bytes too), and its error is bounded by
// Cauchy-Schwarz: |z.e - z'.e'| <= |z - z'| |e| + |z'| |e - e'|. Codes whose screened score is within twice that of the
// best are scored again in double from the fp32 inputs; with 64 channels and 1024 codes that is one code for most rows.
#pragma once
#include <cmath>
#include <limits>

#include "aar/msrq.h"
#include "simd.h"

namespace aar {
namespace AAR_ISA {

constexpr int kBlock = 32;  // codes in a block of the packed layout
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

// Rounds row[dim] to integers out[2 * pairs(dim)], which has room for a whole vector behind; returns the value of one
// unit. `norm` and `error` receive the Euclidean norms of the rounded row and of the rounding.
inline float round_row(const float* row, int64_t dim, float range, int16_t* out, float* norm, float* error) {
  Floats largest = splat(0.0f);
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Floats x = dim - d >= kLanes ? load(row + d) : load_part(row + d, dim - d);
    largest = max(largest, max(x, -x));
  }
  // The smallest normal number keeps an all-zero row, and one of denormals, from dividing by zero.
  const float wanted = max_lane(largest) / range, least = std::numeric_limits<float>::min();
  const float unit = wanted > least ? wanted : least;
  const Floats inverse = splat(1.0f / unit), magic = splat(12582912.0f);
  Floats norm2 = splat(0.0f), error2 = splat(0.0f);
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Floats x = dim - d >= kLanes ? load(row + d) : load_part(row + d, dim - d);
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
    const Floats q = (x * inverse + magic) - magic, back = q * splat(unit);
    store_shorts(out + d, q);
    norm2 = fma(back, back, norm2);
    error2 = fma(x - back, x - back, error2);
  }
  *norm = std::sqrt(sum_lanes(norm2));
  *error = std::sqrt(sum_lanes(error2));
  return unit;
}

struct Book {
  const int16_t* codes;
  const float *scale, *bias, *exact, *bound;
};

inline Book book(const Shape& shape, const Packed& packed, const float* codebooks, int64_t s) {
  const int64_t b = shape.books > 1 ? s : 0, size = padded(shape.codes);
  return {packed.codes + b * size * 2 * pairs(shape.dim), packed.scale + b * size, packed.bias + b * size,
          (shape.cosine ? packed.exact : codebooks) + b * shape.codes * shape.dim, packed.bound + b * 3};
}

inline void pack_book(const float* codebook, const Shape& shape, const Packed& packed, int64_t b) {
  const int64_t dim = shape.dim, half = pairs(dim), size = padded(shape.codes);
  const float range = integer_range(dim);
  int16_t* codes = packed.codes + b * size * 2 * half;
  float *scale = packed.scale + b * size, *bias = packed.bias + b * size;
  float* bound = packed.bound + b * 3;
  Buffer<int16_t> rounded(2 * half + kLanes);
  bound[0] = bound[1] = bound[2] = 0.0f;
  for (int64_t k = 0; k < size; k++) {
    int16_t* out = codes + (k / kBlock) * half * 2 * kBlock + (k % kBlock) * 2;
    if (k >= shape.codes) {
      for (int64_t p = 0; p < half; p++) out[p * 2 * kBlock] = out[p * 2 * kBlock + 1] = 0;
      scale[k] = 0.0f;
      bias[k] = std::numeric_limits<float>::infinity();
      continue;
    }
    const float* e = codebook + k * dim;
    double square = 0.0;
    for (int64_t d = 0; d < dim; d++) square += double(e[d]) * double(e[d]);
    if (shape.cosine) {
      float* normalised = packed.exact + (b * shape.codes + k) * dim;
      const double norm = std::fmax(std::sqrt(square), 1e-12);
      for (int64_t d = 0; d < dim; d++) normalised[d] = float(double(e[d]) / norm);
      e = normalised;
    }
    float norm, error;
    scale[k] = round_row(e, dim, range, rounded, &norm, &error);
    bias[k] = shape.cosine ? 0.0f : float(0.5 * square);
    for (int64_t p = 0; p < half; p++) {
      out[p * 2 * kBlock] = rounded[2 * p];
      out[p * 2 * kBlock + 1] = rounded[2 * p + 1];
    }
    bound[0] = std::fmax(bound[0], norm + error);
    bound[1] = std::fmax(bound[1], error);
    bound[2] = std::fmax(bound[2], bias[k]);
  }
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

// Squared distance to (euclidean) or minus the product with (cosine) one code, in double.
inline double exact_cost(const float* z, const float* e, int64_t dim, bool cosine) {
  double cost = 0.0;
  for (int64_t d = 0; d < dim; d++) {
    const double difference = double(z[d]) - double(e[d]);
    cost += cosine ? -double(z[d]) * double(e[d]) : difference * difference;
  }
  return cost;
}

inline int64_t choose(const float* scores, int64_t size, float threshold, const float* z, const Book& book,
                      const Shape& shape) {
  int64_t chosen = -1;
  double cost = 0.0;
  bool scored = false;  // with a single candidate there is nothing to compare
  for (int64_t block = 0; block < size; block += kBlock) {
    Floats top = load(scores + block);
    for (int v = 1; v < kBlockVectors; v++) top = max(top, load(scores + block + v * kLanes));
    if (mask_ge(top, splat(threshold)) == 0) continue;
    for (int64_t candidate = block; candidate < block + kBlock && candidate < shape.codes; candidate++) {
      if (!(scores[candidate] >= threshold)) continue;
      if (chosen < 0) {
        chosen = candidate;
        continue;
      }
      if (!scored) cost = exact_cost(z, book.exact + chosen * shape.dim, shape.dim, shape.cosine);
      scored = true;
      const double other = exact_cost(z, book.exact + candidate * shape.dim, shape.dim, shape.cosine);
      if (other < cost) chosen = candidate, cost = other;
    }
  }
  return chosen < 0 ? 0 : chosen;  // only a codebook with NaN in it leaves no candidate
}

// For each of some workers, the rounded rows and the scores of a tile.
struct SearchScratch {
  int64_t rounded_size, scores_size;
  Buffer<int16_t> rounded;
  Buffer<float> scores;
  SearchScratch(const Shape& shape, int64_t workers)
      : rounded_size(kSearchRows * 2 * pairs(shape.dim) + 32), scores_size(kSearchRows * padded(shape.codes)),
        rounded(workers * rounded_size), scores(workers * scores_size) {}
};

template <int ROWS>
inline void search_tile(int rows, const float* z, const Book& book, const Shape& shape, int16_t* rounded,
                        float* scores, int64_t* out) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) return search_tile<ROWS - 1>(rows, z, book, shape, rounded, scores, out);
    const int64_t dim = shape.dim, half = pairs(dim), size = padded(shape.codes);
    const float range = integer_range(dim);
    float per_unit[ROWS], tolerance[ROWS], best[ROWS];
    // In order of rows: the vector stored behind a row's end is overwritten by the next one.
    for (int r = 0; r < ROWS; r++) {
      float norm, error;
      const float unit = round_row(z + r * dim, dim, range, rounded + r * 2 * half, &norm, &error);
      per_unit[r] = 1.0f / unit;
      const float inexact = error * book.bound[0] + norm * book.bound[1];
      const float arithmetic = 0x1p-21f * (norm * book.bound[0] + book.bound[2]);
      tolerance[r] = 2.001f * (inexact + arithmetic) * per_unit[r];
    }
    screen<ROWS>(rounded, half, per_unit, book, size, scores, best);
    for (int r = 0; r < ROWS; r++)
      out[r] = choose(scores + r * size, size, best[r] - tolerance[r], z + r * dim, book, shape);
  }
}

// out[n]: index of the code nearest to each of z[n][dim]. `found(codes, count)` is called as they become known.
template <class Found>
inline void search(const float* z, int64_t n, const Book& book, const Shape& shape, SearchScratch& scratch,
                   int64_t worker, int64_t* out, const Found& found) {
  int16_t* rounded = scratch.rounded + worker * scratch.rounded_size;
  float* scores = scratch.scores + worker * scratch.scores_size;
  for (int64_t i = 0; i < n; i += kSearchRows) {
    const int rows = n - i < kSearchRows ? int(n - i) : kSearchRows;
    search_tile<kSearchRows>(rows, z + i * shape.dim, book, shape, rounded, scores, out + i);
    found(out + i, rows);
  }
}

}  // namespace AAR_ISA
}  // namespace aar
