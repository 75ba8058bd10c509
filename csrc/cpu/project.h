// The projections of factorised quantizers: products with few outputs over long sequences, channels first.
#pragma once
#include "aar/msrq.h"
#include "gemm.h"

namespace aar {
namespace AAR_ISA {

// Terms that are added up in a register; sums of these are added up in memory. Longer chains would round worse.
constexpr int64_t kProjectDepth = 128;

inline void project(const float* x, int64_t batch, int64_t channels, int64_t length, const float* weight,
                    const float* bias, int64_t outputs, float* out, const ThreadPool& pool) {
  const int64_t panels = (length + kTileColumns - 1) / kTileColumns;
  parallel(pool, batch * panels, [&](int64_t begin, int64_t end) {
    Buffer<float> panel(kProjectDepth * kTileColumns), sum(outputs * kTileColumns);
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / panels, t = task % panels * kTileColumns;
      const int64_t frames = length - t < kTileColumns ? length - t : kTileColumns;
      for (int64_t n = 0; n < outputs; n++)
        for (int v = 0; v < 2; v++) store(sum + n * kTileColumns + v * kLanes, splat(bias[n]));
      for (int64_t c = 0; c < channels; c += kProjectDepth) {
        const int64_t depth = channels - c < kProjectDepth ? channels - c : kProjectDepth;
        for (int64_t k = 0; k < depth; k++) {
          const float* source = x + (b * channels + c + k) * length + t;
          float* row = panel + k * kTileColumns;
          if (frames < kTileColumns) std::memset(row, 0, sizeof(float) * kTileColumns);
          std::memcpy(row, source, sizeof(float) * frames);
        }
        for (int64_t n = 0; n < outputs; n += kTileRows) {
          const int rows = outputs - n < kTileRows ? int(outputs - n) : kTileRows;
          gemm_edge<kTileRows>(rows, weight + n * channels + c, channels, 1, panel, kTileColumns, depth,
                               sum + n * kTileColumns, kTileColumns);
        }
      }
      for (int64_t n = 0; n < outputs; n++)
        std::memcpy(out + (b * outputs + n) * length + t, sum + n * kTileColumns, sizeof(float) * frames);
    }
  });
}

// Rows of the codebooks[books][size][dim] that codes name, channels first: out[b][s * dim + d][t] is channel d of level
// s's code for frame t, of which it has one for every length / lengths[s]. Code -1 is a zero row. Returns false where a
// code is outside [-1, size); then out is incomplete.
inline bool gather(const Shape& shape, const float* codebooks, const int64_t* codes, int64_t batch, int64_t length,
                   float* out, const ThreadPool& pool) {
  const int64_t dim = shape.dim;
  int64_t tokens = 0;
  for (int64_t s = 0; s < shape.scales; s++) tokens += shape.lengths[s];
  for (int64_t i = 0; i < batch * tokens; i++)
    if (codes[i] < -1 || codes[i] >= shape.codes) return false;
  parallel(pool, batch, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      const int64_t* code = codes + b * tokens;
      for (int64_t s = 0; s < shape.scales; code += shape.lengths[s++]) {
        const int64_t stride = length / shape.lengths[s];
        const float* book = codebooks + s * shape.codes * dim;
        for (int64_t d = 0; d < dim; d++) {
          float* row = out + ((b * shape.scales + s) * dim + d) * length;
          for (int64_t i = 0; i < shape.lengths[s]; i++) {
            const float value = code[i] < 0 ? 0.0f : book[code[i] * dim + d];
            for (int64_t j = 0; j < stride; j++) *row++ = value;
          }
        }
      }
    }
  });
  return true;
}

}  // namespace AAR_ISA
}  // namespace aar
