// Convolutions with fewer multiplications: two steps and two taps in three products for four (Winograd's F(2, 2)).
//   y0 = x0 w0 + x1 w1 = x1 (w0 + w1) + (x0 - x1) w0
//   y1 = x1 w0 + x2 w1 = x1 (w0 + w1) + (x2 - x1) w1
// A tap reads a row's width of A (stride * channels floats), and the next tap the next row, so that x, w are rows and
// matrices. Sums of weights are made as they are read. A row's result depends on whether it is the first or the second
// of its pair, and on nothing else: it is the same to the last bit if the other is not computed.
#pragma once
#include "sliding_tile.h"

namespace aar {
namespace AAR_ISA {

// out[rows][depth] = a - b, rows `step` apart.
inline void subtract(int64_t rows, const float* a, const float* b, int64_t step, int64_t depth, float* out) {
  for (int64_t r = 0; r < rows; r++, a += step, b += step, out += depth)
    for (int64_t k = 0; k < depth; k++) out[k] = a[k] - b[k];
}

constexpr int kPair = 4;  // vectors of a tile for one pair, whose three sums in each leave AVX2 one register to read into

// One pair of rows, or its first or second alone: out[ROWS] = x1 (w0 + w1) + differences[ROWS] (w0 or w1) + bias, plus
// what is there. The weights pass by once; sums are those of two tiles, in their order.
template <bool FIRST, bool SECOND, int VECTORS, class W>
__attribute__((noinline)) void pair_tile(const float* x1, const float* differences, const Weights<W>& weights,
                                         const Target& to) {
  constexpr int ROWS = FIRST + SECOND, per_panel = kColumns / kLanes;
  const int64_t next_panel = weights.next, partner = weights.partner, depth = weights.depth;
  const W *panel = weights.panel, *bias = weights.bias;
  Floats both[VECTORS], own[ROWS][VECTORS];
  AAR_UNROLL for (int v = 0; v < VECTORS; v++) {
    both[v] = splat(0.0f);
    AAR_UNROLL for (int r = 0; r < ROWS; r++) own[r][v] = splat(0.0f);
  }
  _Pragma("GCC unroll 2") for (int64_t k = 0; k < depth; k++, panel += kColumns) {
    AAR_UNROLL for (int v = 0; v < VECTORS; v += per_panel) {
      const W* ahead = panel + v / per_panel * next_panel + kSlidingAhead / int64_t(sizeof(W));
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + partner);
    }
    const Floats x = splat(x1[k]);
    Floats difference[ROWS];
    AAR_UNROLL for (int r = 0; r < ROWS; r++) difference[r] = splat(differences[r * depth + k]);
    AAR_UNROLL for (int v = 0; v < VECTORS; v++) {
      const W* at = panel + v / per_panel * next_panel + v % per_panel * kLanes;
      Floats w = load(at);
      stay(w);
      if constexpr (FIRST) own[0][v] = fma(difference[0], w, own[0][v]);
      if constexpr (SECOND) own[ROWS - 1][v] = fma(difference[ROWS - 1], load(at + partner), own[ROWS - 1][v]);
      w += load(at + partner);
      both[v] = fma(x, w, both[v]);
    }
  }
  AAR_UNROLL for (int v = 0; v < VECTORS; v++) {
    if (bias != nullptr) both[v] += load(bias + v / per_panel * next_panel + v % per_panel * kLanes);
    AAR_UNROLL for (int r = 0; r < ROWS; r++) {
      float* out = to.at(r) + v * kLanes;
      store(out, own[r][v] + (to.add ? both[v] + load(out) : both[v]));
    }
  }
  if (to.elu)
    for (int r = 0; r < ROWS; r++) elu(to.at(r), VECTORS * kLanes, to.at(r));
}

// Panels [p0, p1) of pairs of rows, of which a.data and to.data are the first. `firsts` and `seconds` of them are
// wanted, equally many or one more of either; a pair that lacks its first is the only one.
template <class W>
void pairs_of_rows(int64_t firsts, int64_t seconds, const SlidingRows& a, const Product<W>& b, int64_t p0,
                   int64_t p1, const Target& to) {
  const int64_t both = std::min(firsts, seconds), pairs = std::max(firsts, seconds), end = std::min(p1 * kColumns, b.N);
  const auto for_tiles = [&](int64_t rows, const auto& f) {
    for (int64_t n = p0 * kColumns, width; n < end; n += width) {
      width = tile_columns(rows, end - n);
      f(n, std::min(width, end - n));
    }
  };
  // The tap without a partner is the first.
  const int64_t lone = b.K / b.tap % 2 * b.tap, rows = firsts + seconds, start = firsts == 0;
  for (int64_t k = 0, depth; k < lone; k += depth) {
    depth = std::min(kSlidingDepth, lone - k);
    for_tiles(rows, [&](int64_t n, int64_t columns) {
      const Target out{to.at(start) + n, to.row, to.add || k > 0, false};
      sliding_block(rows, a.from(start).data + k, a.row, b.weights(n, k, depth, false), columns, out);
    });
  }
  const int64_t row = 2 * a.row, out_row = 2 * to.row, room = std::min(kSlidingDepth, b.tap);
  Buffer<float> differences(rows * room);
  for (int64_t tap = lone; tap < b.K; tap += 2 * b.tap)
    for (int64_t k = tap, depth; k < tap + b.tap; k += depth) {
      depth = std::min(kSlidingDepth, tap + b.tap - k);
      const bool add = to.add || k > 0, last = k + depth + b.tap == b.K;
      const float *x0 = a.data + k, *x1 = x0 + a.row, *x2 = x1 + a.row;
      float *before = differences, *after = before + firsts * depth;
      subtract(firsts, x0, x1, row, depth, before);
      subtract(seconds, x2, x1, row, depth, after);
      if (pairs == 1) {
        for (int64_t n = p0 * kColumns, width; n < end; n += width) {
          const auto weights = b.weights(n, k, depth, last, b.tap);
          const Target out{to.at(start) + n, to.row, add, to.elu && last};
          const bool wide = end - n >= kPair * kLanes;
          width = wide ? kPair * kLanes : kColumns;
          constexpr int panel = kColumns / kLanes;
          const auto tile = both > 0     ? wide ? pair_tile<true, true, kPair, W> : pair_tile<true, true, panel, W>
                            : firsts > 0 ? wide ? pair_tile<true, false, kPair, W> : pair_tile<true, false, panel, W>
                            : wide       ? pair_tile<false, true, kPair, W>
                                         : pair_tile<false, true, panel, W>;
          tile(x1, differences, weights, out);
        }
        continue;
      }
      for_tiles(pairs, [&](int64_t n, int64_t columns) {
        float *y0 = to.data + n, *y1 = y0 + to.row;
        const auto w0 = b.weights(n, k, depth, false), w1 = b.weights(n, k + b.tap, depth, false);
        const auto sum = b.weights(n, k, depth, last, b.tap);
        sliding_block<true>(both, x1, row, sum, columns, {y0, out_row, add, false, to.row});
        if (pairs > both)
          sliding_block<true>(1, x1 + both * row, row, sum, columns,
                              {(firsts > 0 ? y0 : y1) + both * out_row, out_row, add, false});
        sliding_block(firsts, before, depth, w0, columns, {y0, out_row, true, to.elu && last});
        sliding_block(seconds, after, depth, w1, columns, {y1, out_row, true, to.elu && last});
      });
    }
}

// Panels [p0, p1) of `rows` rows, of which the first, with `odd`, is the second of its pair.
template <class W>
void paired_panels(int64_t rows, bool odd, const SlidingRows& a, const Product<W>& b, int64_t p0, int64_t p1,
                   const Target& to) {
  if (rows == 1 && p1 - p0 > kAlonePanels) {  // each panel is read from end to end
    paired_panels(rows, odd, a, b, p0, p0 + kAlonePanels, to);
    return paired_panels(rows, odd, a, b, p0 + kAlonePanels, p1, to);
  }
  if (odd) pairs_of_rows(0, 1, a.from(-1), b, p0, p1, to.from(-1));
  const int64_t left = rows - odd;
  if (left > 0) pairs_of_rows((left + 1) / 2, left / 2, a.from(odd), b, p0, p1, to.from(odd));
}

}  // namespace AAR_ISA
}  // namespace aar
