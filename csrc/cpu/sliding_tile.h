// Register tiles of products over rows that overlap, and what they read and write.
#pragma once
#include <algorithm>

#include "aar/seanet.h"
#include "elu.h"
#include "storage.h"

namespace aar {
namespace AAR_ISA {

constexpr int64_t kColumns = kSeanetPanel;
// Steps of K that are summed up in registers, before rounding errors add up; a block of a panel is then 8 KB.
constexpr int64_t kSlidingDepth = 128;
constexpr int64_t kSlidingRows = 96;   // that share a block of a panel in the first-level cache
constexpr int64_t kSlidingAhead = 1024;  // bytes of a panel, fetched ahead where each is read once
constexpr int kWide = kLanes * 2 < kColumns ? kColumns / kLanes : 2;  // vectors of a tile: whole panels, two at least
constexpr int kNarrow = kWide / 2;                                    // for what is left of the columns
constexpr int kWideRows = kRegisters == 32 ? 12 : kWide == 2 ? 6 : 3;
constexpr int kAlone = kLanes < 16 ? 8 : 4;                           // for a single row
constexpr int64_t kAlonePanels = kAlone * kLanes / kColumns;
constexpr int kNarrowRows = kRegisters == 32 ? 16 : 2 * kWideRows;

// `depth` rows of a panel; the next panel is `next` behind. A tile of sums takes each row plus the one `partner` behind
// it. The bias may be null.
template <class W>
struct Weights {
  const W* panel;
  int64_t next, depth, partner;
  const W* bias;
};

// B of a product, in panels as in seanet.h. Where `tap` is not 0, it is a convolution whose taps read that many floats,
// one row of A apart, and rows are computed in pairs (fast_fir.h).
template <class W>
struct Product {
  const W* data;
  int64_t K, N, tap = 0;
  int64_t panel() const { return (K + 1) * kColumns; }
  int64_t panels() const { return (N + kColumns - 1) / kColumns; }
  // Rows [k, k + depth) from column n on.
  Weights<W> weights(int64_t n, int64_t k, int64_t depth, bool with_bias, int64_t partner = 0) const {
    const W* column = data + n / kColumns * panel() + n % kColumns;
    return {column + k * kColumns, panel(), depth, partner * kColumns, with_bias ? column + K * kColumns : nullptr};
  }
};

// Rows of A: K floats in runs of `run`, `run_step` apart (the taps of a dilated convolution; else one run).
struct SlidingRows {
  const float* data;
  int64_t row, run, run_step;
  SlidingRows from(int64_t r) const { return {data + r * row, row, run, run_step}; }
};

struct Target {
  float* data;
  int64_t row;
  bool add;          // to what is there
  bool elu;          // of the result
  int64_t twin = 0;  // how far off a second place lies that gets the same sums; 0: none
  float* at(int64_t r) const { return data + r * row; }
  Target from(int64_t r) const { return {at(r), row, add, elu, twin}; }
};

#define AAR_UNROLL _Pragma("GCC unroll 16")

// out[ROWS][VECTORS * kLanes] = A B + bias, plus what is there. Not inlined, and unrolled from the start, so that the
// sums stay in registers.
template <int ROWS, int VECTORS, bool SUM, class W>
__attribute__((noinline)) void sliding_tile(const float* a, int64_t a_row, const Weights<W>& weights,
                                            const Target& target) {
  constexpr int per_panel = kColumns / kLanes;
  Floats sum[ROWS][VECTORS];
  AAR_UNROLL for (int r = 0; r < ROWS; r++)
    AAR_UNROLL for (int v = 0; v < VECTORS; v++) sum[r][v] = splat(0.0f);
  const float* rows[ROWS];
  AAR_UNROLL for (int r = 0; r < ROWS; r++) rows[r] = a + r * a_row;
  const Target to = target;  // a copy, which stores cannot change
  const int64_t next_panel = weights.next, partner = weights.partner, depth = weights.depth;
  const W *panel = weights.panel, *bias = weights.bias;
  // So few rounds that the end of the loop is predicted.
  _Pragma("GCC unroll 4") for (int64_t k = 0; k < depth; k++, panel += kColumns) {
    if constexpr (ROWS == 1)  // the weight passes by once
      AAR_UNROLL for (int v = 0; v < VECTORS; v += per_panel)
        __builtin_prefetch(panel + v / per_panel * next_panel + kSlidingAhead / int64_t(sizeof(W)));
    const auto weight = [&](int v) {
      const W* at = panel + v / per_panel * next_panel + v % per_panel * kLanes;
      if constexpr (SUM) return load(at) + load(at + partner);
      return load(at);
    };
    if constexpr (ROWS == 1) {
      const Floats x = splat(rows[0][k]);
      AAR_UNROLL for (int v = 0; v < VECTORS; v++) {
        Floats b = weight(v);
        if constexpr (SUM || sizeof(W) < sizeof(float)) stay(b);  // else GCC makes all first, and a sum has no register
        sum[0][v] = fma(x, b, sum[0][v]);
      }
    } else {
      Floats b[VECTORS];
      AAR_UNROLL for (int v = 0; v < VECTORS; v++) b[v] = weight(v);
      AAR_UNROLL for (int r = 0; r < ROWS; r++) {
        const Floats x = splat(rows[r][k]);
        AAR_UNROLL for (int v = 0; v < VECTORS; v++) sum[r][v] = fma(x, b[v], sum[r][v]);
      }
    }
  }
  if (bias != nullptr)
    AAR_UNROLL for (int v = 0; v < VECTORS; v++) {
      const Floats b = load(bias + v / per_panel * next_panel + v % per_panel * kLanes);
      AAR_UNROLL for (int r = 0; r < ROWS; r++) sum[r][v] += b;
    }
  if (to.twin != 0)
    AAR_UNROLL for (int r = 0; r < ROWS; r++)
      AAR_UNROLL for (int v = 0; v < VECTORS; v++) {
        float* out = to.at(r) + to.twin + v * kLanes;
        store(out, to.add ? load(out) + sum[r][v] : sum[r][v]);
      }
  if (to.add)
    AAR_UNROLL for (int r = 0; r < ROWS; r++)
      AAR_UNROLL for (int v = 0; v < VECTORS; v++) sum[r][v] += load(to.at(r) + v * kLanes);
  AAR_UNROLL for (int r = 0; r < ROWS; r++)
    AAR_UNROLL for (int v = 0; v < VECTORS; v++) store(to.at(r) + v * kLanes, sum[r][v]);
  if (to.elu)
    for (int r = 0; r < ROWS; r++) elu(to.at(r), VECTORS * kLanes, to.at(r));
}

template <int ROWS, int VECTORS, bool SUM, class W>
inline void sliding_edge(int64_t rows, const float* a, int64_t a_row, const Weights<W>& weights, const Target& to) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return sliding_tile<ROWS, VECTORS, SUM>(a, a_row, weights, to);
    sliding_edge<ROWS - 1, VECTORS, SUM>(rows, a, a_row, weights, to);
  }
}

// All rows of one tile's columns. Tiles are of nearly equal size; columns behind the last are not written.
template <int ROWS, int VECTORS, bool SUM, class W>
void sliding_columns(int64_t rows, const float* a, int64_t a_row, const Weights<W>& weights, int64_t columns,
                     const Target& to) {
  constexpr int width = VECTORS * kLanes;
  const int64_t tiles = (rows + ROWS - 1) / ROWS;
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t begin = rows * t / tiles, count = rows * (t + 1) / tiles - begin;
    const Target out = to.from(begin);
    const float* left = a + begin * a_row;
    if (columns >= width) {
      sliding_edge<ROWS, VECTORS, SUM>(count, left, a_row, weights, out);
      continue;
    }
    float tile[ROWS * width] = {};
    if (out.add)
      for (int64_t r = 0; r < count; r++)
        std::copy(out.at(r), out.at(r) + columns, tile + r * width);
    sliding_edge<ROWS, VECTORS, SUM>(count, left, a_row, weights, {tile, width, out.add, out.elu});
    for (int64_t r = 0; r < count; r++) std::copy(tile + r * width, tile + r * width + columns, out.at(r));
  }
}

// The width of the next tile where `columns` are left. For one row the bound is the weight's way from the caches, which
// several panels side by side use better than one.
inline int64_t tile_columns(int64_t rows, int64_t columns) {
  if (rows == 1 && columns >= kAlone * kLanes) return kAlone * kLanes;
  return columns > kNarrow * kLanes ? kWide * kLanes : kNarrow * kLanes;
}

template <bool SUM = false, class W>
inline void sliding_block(int64_t rows, const float* a, int64_t a_row, const Weights<W>& weights, int64_t columns,
                          const Target& to) {
  if (rows == 1 && columns >= kAlone * kLanes)
    sliding_tile<1, kAlone, SUM>(a, a_row, weights, to);
  else if (columns > kNarrow * kLanes)
    sliding_columns<kWideRows, kWide, SUM>(rows, a, a_row, weights, columns, to);
  else
    sliding_columns<kNarrowRows, kNarrow, SUM>(rows, a, a_row, weights, columns, to);
}

}  // namespace AAR_ISA
}  // namespace aar
