// Nearest code of each of a few rows, in fp32 from a codebook as it is: for codebooks that change too often to be packed.
//
// A tile multiplies some codes by rows that lie side by side in a panel, so that nothing of the codebook is rearranged.
// Codes whose score is within twice the largest error of the best are compared in double.
#pragma once
#include "gemm.h"
#include "search.h"

namespace aar {
namespace AAR_ISA {

// A codebook of which nothing but norms was computed.
struct PlainBook {
  const float *codes, *bias;     // as searched (normalised for cosine), and |e|^2 / 2 (0 for cosine)
  float largest, largest_bias;   // |e| and bias, at most
};

struct FloatScratch {
  int64_t panel_size, scores_size;
  Buffer<float> panel, scores;
  FloatScratch(const Shape& shape, int64_t workers)
      : panel_size(shape.dim * kTileColumns), scores_size(shape.codes * kTileColumns), panel(workers * panel_size),
        scores(workers * scores_size) {}
};

// Least score of a candidate of each row in the panel, given the best ones; NaN where scores might not be finite.
inline void thresholds(const float* panel, const PlainBook& book, int64_t dim, float* scores) {
  Floats square[2] = {splat(0.0f), splat(0.0f)};
  for (int64_t d = 0; d < dim; d++)
    for (int v = 0; v < 2; v++) {
      const Floats z = load(panel + d * kTileColumns + v * kLanes);
      square[v] = fma(z, z, square[v]);
    }
  // A sum of products (of biases too) in n roundings is off by n * 2^-24 of the sum of their magnitudes, plus what underflows.
  const float relative = 2.001f * float(dim + 4) * 0x1p-24f;
  for (int j = 0; j < kTileColumns; j++) {
    const float magnitude = std::sqrt(square[j / kLanes][j % kLanes]) * book.largest + book.largest_bias;
    const float tolerance = relative * magnitude + std::numeric_limits<float>::min();
    scores[j] = magnitude < 1e37f ? scores[j] - tolerance : std::numeric_limits<float>::quiet_NaN();
  }
}

// out[n]: index of the code nearest to each of z[n][dim], the first of equals.
inline void search_floats(const float* z, int64_t n, const PlainBook& book, const Shape& shape, FloatScratch& scratch,
                          int64_t worker, int64_t* out) {
  const int64_t dim = shape.dim;
  float* panel = scratch.panel + worker * scratch.panel_size;
  float* scores = scratch.scores + worker * scratch.scores_size;
  for (int64_t i = 0; i < n; i += kTileColumns, z += kTileColumns * dim, out += kTileColumns) {
    const int rows = n - i < kTileColumns ? int(n - i) : kTileColumns;
    for (int64_t d = 0; d < dim; d++)
      for (int j = 0; j < kTileColumns; j++) panel[d * kTileColumns + j] = j < rows ? z[j * dim + d] : 0.0f;
    Floats best[2] = {splat(-std::numeric_limits<float>::infinity()), splat(-std::numeric_limits<float>::infinity())};
    for (int64_t k = 0; k < shape.codes; k += kTileRows) {
      const int codes = shape.codes - k < kTileRows ? int(shape.codes - k) : kTileRows;
      float* tile = scores + k * kTileColumns;
      gemm_edge<kTileRows, false>(codes, book.codes + k * dim, dim, 1, panel, kTileColumns, dim, tile, kTileColumns);
      for (int c = 0; c < codes; c++)
        for (int v = 0; v < 2; v++) {
          float* at = tile + c * kTileColumns + v * kLanes;
          const Floats score = load(at) - splat(book.bias[k + c]);
          store(at, score);
          best[v] = max(best[v], score);
        }
    }
    float least[kTileColumns];
    for (int v = 0; v < 2; v++) store(least + v * kLanes, best[v]);
    thresholds(panel, book, dim, least);
    const Floats low[2] = {load(least), load(least + kLanes)};
    const uint32_t all = uint32_t((uint64_t(1) << rows) - 1);
    double cost[kTileColumns];
    for (int j = 0; j < rows; j++) out[j] = -1;
    for (int64_t k = 0; k < shape.codes; k++) {
      const float* at = scores + k * kTileColumns;
      // Not "at least": what cannot be compared is a candidate too.
      uint32_t bits = all & ~(mask_ge(low[0], load(at)) | mask_ge(low[1], load(at + kLanes)) << kLanes);
      for (; bits != 0; bits &= bits - 1) {
        const int j = __builtin_ctz(bits);
        const auto cost_of = [&](int64_t code) {
          return exact_cost(z + j * dim, book.codes + code * dim, dim, shape.cosine);
        };
        if (out[j] < 0) {
          out[j] = k;
          cost[j] = std::numeric_limits<double>::quiet_NaN();  // computed when it is compared
          continue;
        }
        if (cost[j] != cost[j]) cost[j] = cost_of(out[j]);
        const double other = cost_of(k);
        if (other < cost[j] || cost[j] != cost[j]) out[j] = k, cost[j] = other;
      }
    }
    for (int j = 0; j < rows; j++)
      if (out[j] < 0) out[j] = 0;  // only a codebook with NaN in it leaves no candidate
  }
}

}  // namespace AAR_ISA
}  // namespace aar
