// Matrix products over rows that overlap: row r of A is the run of K floats at a + r * a_row, so that a convolution
// over a signal [time][channels] is a product without a copy of the signal (no im2col).
#pragma once
#include <algorithm>

#include "aar/seanet.h"
#include "elu.h"
#include "simd.h"

namespace aar {
namespace AAR_ISA {

constexpr int64_t kColumns = kSeanetPanel;
// Steps of K that are summed up in registers, before rounding errors add up; a block of a panel is then 8 KB.
constexpr int64_t kSlidingDepth = 128;
constexpr int64_t kSlidingRows = 96;   // that share a block of a panel in the first-level cache
constexpr int64_t kSlidingAhead = 16;  // rows of a panel, fetched ahead where each is read once
constexpr int kWide = kLanes * 2 < kColumns ? kColumns / kLanes : 2;  // vectors of a tile: whole panels, two at least
constexpr int kNarrow = kWide / 2;                                    // for what is left of the columns
constexpr int kWideRows = kRegisters == 32 ? 12 : kWide == 2 ? 6 : 3;
constexpr int kAlone = kLanes < 16 ? 8 : 4;                           // for a single row
constexpr int kNarrowRows = kRegisters == 32 ? 16 : 2 * kWideRows;

// B of a product, in panels as in seanet.h.
struct Product {
  const float* data;
  int64_t K, N;
  int64_t panel() const { return (K + 1) * kColumns; }
  int64_t panels() const { return (N + kColumns - 1) / kColumns; }
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
  bool add;  // to what is there
  bool elu;  // of the result
  float* at(int64_t r) const { return data + r * row; }
  Target from(int64_t r) const { return {at(r), row, add, elu}; }
};

#define AAR_UNROLL _Pragma("GCC unroll 16")

// out[ROWS][VECTORS * kLanes] = A B + bias (null: none), plus what is there. Not inlined, and unrolled from the start,
// so that the sums stay in registers.
template <int ROWS, int VECTORS>
__attribute__((noinline)) void sliding_tile(const float* a, int64_t a_row, const float* panel, int64_t next_panel,
                                            int64_t depth, const float* bias, const Target target) {
  constexpr int per_panel = kColumns / kLanes;
  Floats sum[ROWS][VECTORS];
  AAR_UNROLL for (int r = 0; r < ROWS; r++)
    AAR_UNROLL for (int v = 0; v < VECTORS; v++) sum[r][v] = splat(0.0f);
  const float* rows[ROWS];
  AAR_UNROLL for (int r = 0; r < ROWS; r++) rows[r] = a + r * a_row;
  const Target to = target;  // a copy, which stores cannot change
  // So few rounds that the end of the loop is predicted.
  _Pragma("GCC unroll 4") for (int64_t k = 0; k < depth; k++, panel += kColumns) {
    if constexpr (ROWS == 1)  // the weight passes by once
      AAR_UNROLL for (int v = 0; v < VECTORS; v += per_panel)
        __builtin_prefetch(panel + v / per_panel * next_panel + kSlidingAhead * kColumns);
    Floats b[VECTORS];
    AAR_UNROLL for (int v = 0; v < VECTORS; v++)
      b[v] = load(panel + v / per_panel * next_panel + v % per_panel * kLanes);
    AAR_UNROLL for (int r = 0; r < ROWS; r++) {
      const Floats x = splat(rows[r][k]);
      AAR_UNROLL for (int v = 0; v < VECTORS; v++) sum[r][v] = fma(x, b[v], sum[r][v]);
    }
  }
  if (bias != nullptr)
    AAR_UNROLL for (int v = 0; v < VECTORS; v++) {
      const Floats b = load(bias + v / per_panel * next_panel + v % per_panel * kLanes);
      AAR_UNROLL for (int r = 0; r < ROWS; r++) sum[r][v] += b;
    }
  if (to.add)
    AAR_UNROLL for (int r = 0; r < ROWS; r++)
      AAR_UNROLL for (int v = 0; v < VECTORS; v++) sum[r][v] += load(to.at(r) + v * kLanes);
  AAR_UNROLL for (int r = 0; r < ROWS; r++)
    AAR_UNROLL for (int v = 0; v < VECTORS; v++) store(to.at(r) + v * kLanes, sum[r][v]);
  if (to.elu)
    for (int r = 0; r < ROWS; r++) elu(to.at(r), VECTORS * kLanes, to.at(r));
}

#undef AAR_UNROLL

template <int ROWS, int VECTORS>
inline void sliding_edge(int64_t rows, const float* a, int64_t a_row, const float* panel, int64_t next_panel,
                         int64_t depth, const float* bias, const Target& to) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return sliding_tile<ROWS, VECTORS>(a, a_row, panel, next_panel, depth, bias, to);
    sliding_edge<ROWS - 1, VECTORS>(rows, a, a_row, panel, next_panel, depth, bias, to);
  }
}

// All rows of one block of a panel. Tiles are of nearly equal size; columns behind the last are not written.
template <int ROWS, int VECTORS>
void sliding_columns(int64_t rows, const float* a, int64_t a_row, const float* panel, int64_t next_panel, int64_t depth,
                     const float* bias, int64_t columns, const Target& to) {
  constexpr int width = VECTORS * kLanes;
  const int64_t tiles = (rows + ROWS - 1) / ROWS;
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t begin = rows * t / tiles, count = rows * (t + 1) / tiles - begin;
    const Target out = to.from(begin);
    const float* left = a + begin * a_row;
    if (columns >= width) {
      sliding_edge<ROWS, VECTORS>(count, left, a_row, panel, next_panel, depth, bias, out);
      continue;
    }
    float tile[ROWS * width] = {};
    if (out.add)
      for (int64_t r = 0; r < count; r++)
        std::copy(out.at(r), out.at(r) + columns, tile + r * width);
    sliding_edge<ROWS, VECTORS>(count, left, a_row, panel, next_panel, depth, bias, {tile, width, out.add, out.elu});
    for (int64_t r = 0; r < count; r++) std::copy(tile + r * width, tile + r * width + columns, out.at(r));
  }
}

// f(k, depth, A's columns from k on) for each chain of K.
template <class F>
inline void for_chains(const SlidingRows& a, const Product& b, const F& f) {
  for (int64_t k = 0, depth; k < b.K; k += depth) {
    depth = std::min({kSlidingDepth, a.run - k % a.run, b.K - k});
    f(k, depth, a.data + k / a.run * a.run_step + k % a.run);
  }
}

// One row of the panels from p0 on; gives the first that is left. The bound is the weight's way from the caches, which
// several panels side by side use better than one.
inline int64_t sliding_row(const SlidingRows& a, const Product& b, int64_t p0, int64_t p1, const Target& to) {
  constexpr int64_t width = kAlone * kLanes;
  for (; (p0 * kColumns + width) <= std::min(p1 * kColumns, b.N); p0 += width / kColumns)
    for_chains(a, b, [&](int64_t k, int64_t depth, const float* left) {
      const bool last = k + depth == b.K;
      const float* panel = b.data + p0 * b.panel() + k * kColumns;
      sliding_tile<1, kAlone>(left, 0, panel, b.panel(), depth, last ? panel + depth * kColumns : nullptr,
                              {to.data + p0 * kColumns, to.row, to.add || k > 0, to.elu && last});
    });
  return p0;
}

// Panels [p0, p1) of `rows` rows.
inline void sliding_panels(int64_t rows, const SlidingRows& a, const Product& b, int64_t p0, int64_t p1,
                           const Target& to) {
  if (rows == 1) p0 = sliding_row(a, b, p0, p1, to);
  for_chains(a, b, [&](int64_t k, int64_t depth, const float* left) {
    const bool last = k + depth == b.K;
    for (int64_t n = p0 * kColumns; n < std::min(p1 * kColumns, b.N);) {
      const float* panel = b.data + n / kColumns * b.panel() + n % kColumns + k * kColumns;
      const float* bias = last ? panel + depth * kColumns : nullptr;
      const int64_t columns = std::min(p1 * kColumns, b.N) - n;
      const Target out{to.data + n, to.row, to.add || k > 0, to.elu && last};
      if (columns > kNarrow * kLanes)
        sliding_columns<kWideRows, kWide>(rows, left, a.row, panel, b.panel(), depth, bias, columns, out);
      else
        sliding_columns<kNarrowRows, kNarrow>(rows, left, a.row, panel, b.panel(), depth, bias, columns, out);
      n += columns > kNarrow * kLanes ? kWide * kLanes : kNarrow * kLanes;
    }
  });
}

// One or two columns: each sum is taken along K, instead of along columns that are not there.
inline void sliding_dots(int64_t rows, const SlidingRows& a, const Product& b, const Target& to) {
  const int64_t room = (b.K + kLanes - 1) / kLanes * kLanes;
  Buffer<float> weight(room);
  for (int64_t n = 0; n < b.N; n++) {
    for (int64_t k = 0; k < b.K; k++) weight[k] = b.data[k * kColumns + n];
    for (int64_t r = 0; r < rows; r++) {
      Floats sums[2] = {splat(0.0f), splat(0.0f)};
      for (int64_t begin = 0; begin < b.K; begin += a.run) {
        const float *x = a.data + r * a.row + begin / a.run * a.run_step, *w = weight + begin;
        int64_t k = 0;
        for (; k + 2 * kLanes <= a.run; k += 2 * kLanes)
          for (int i = 0; i < 2; i++) sums[i] = fma(load(x + k + i * kLanes), load(w + k + i * kLanes), sums[i]);
        for (int i = 0; k < a.run; k += kLanes, i++)
          sums[i] = fma(load_part(x + k, a.run - k), load_part(w + k, a.run - k), sums[i]);
      }
      float& out = to.at(r)[n];
      out = sum_lanes(sums[0] + sums[1]) + b.data[b.K * kColumns + n] + (to.add ? out : 0.0f);
    }
  }
  if (to.elu)
    for (int64_t r = 0; r < rows; r++) elu(to.at(r), b.N, to.at(r));
}

// The whole product by all threads: blocks of rows, and where these are few, groups of pairs of panels.
inline void sliding_product(int64_t rows, const SlidingRows& a, const Product& b, const Target& to,
                            const ThreadPool& pool = {}) {
  const int64_t blocks = (rows + kSlidingRows - 1) / kSlidingRows, pairs = (b.panels() + 1) / 2;
  const int64_t groups = blocks >= 2 * pool.threads ? 1 : std::min<int64_t>(pool.threads, pairs);
  parallel(pool, blocks * groups, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t block = task % blocks, group = task / blocks;
      const int64_t r0 = rows * block / blocks, r1 = rows * (block + 1) / blocks;
      const int64_t p0 = pairs * group / groups * 2, p1 = std::min(pairs * (group + 1) / groups * 2, b.panels());
      if (b.N <= 2)
        sliding_dots(r1 - r0, a.from(r0), b, to.from(r0));
      else
        sliding_panels(r1 - r0, a.from(r0), b, p0, p1, to.from(r0));
    }
  });
}

}  // namespace AAR_ISA
}  // namespace aar
