// Matrix products over rows that overlap: row r of A is the run of K floats at a + r * a_row, so that a convolution
// over a signal [time][channels] is a product without a copy of the signal (no im2col).
#pragma once
#include "fast_fir.h"

namespace aar {
namespace AAR_ISA {

// Panels [p0, p1) of `rows` rows: of a single row some panels at a time, so that each is read from end to end.
template <class W>
void sliding_panels(int64_t rows, const SlidingRows& a, const Product<W>& b, int64_t p0, int64_t p1, const Target& to) {
  if (rows == 1 && p1 - p0 > kAlonePanels) {
    sliding_panels(rows, a, b, p0, p0 + kAlonePanels, to);
    return sliding_panels(rows, a, b, p0 + kAlonePanels, p1, to);
  }
  for (int64_t k = 0, depth; k < b.K; k += depth) {
    depth = std::min({kSlidingDepth, a.run - k % a.run, b.K - k});
    const bool last = k + depth == b.K;
    const int64_t end = std::min(p1 * kColumns, b.N);
    for (int64_t n = p0 * kColumns; n < end; n += tile_columns(rows, end - n))
      sliding_block(rows, a.data + k / a.run * a.run_step + k % a.run, a.row, b.weights(n, k, depth, last), end - n,
                    {to.data + n, to.row, to.add || k > 0, to.elu && last});
  }
}

// Row i of kLanes rows x, times a column of K weights, is lane i of the result.
__attribute__((noinline)) inline Floats sliding_dot(const float* const (&x)[kLanes], const SlidingRows& a,
                                                    const float* weight, int64_t K) {
  Floats sums[kLanes];
  AAR_UNROLL for (Floats& sum : sums) sum = splat(0.0f);
  for (int64_t begin = 0; begin < K; begin += a.run, weight += a.run) {
    const int64_t at = begin / a.run * a.run_step;
    int64_t k = 0;
    for (; k + kLanes <= a.run; k += kLanes) {
      const Floats w = load(weight + k);
      AAR_UNROLL for (int i = 0; i < kLanes; i++) sums[i] = fma(load(x[i] + at + k), w, sums[i]);
    }
    if (k == a.run) continue;
    const Floats w = load_part(weight + k, a.run - k);
    for (int i = 0; i < kLanes; i++) sums[i] = fma(load_part(x[i] + at + k, a.run - k), w, sums[i]);
  }
  transpose(sums);
  Floats total = sums[0];
  for (int i = 1; i < kLanes; i++) total += sums[i];
  return total;
}

// One or two columns: each sum is taken along K, instead of along columns that are not there.
template <class W>
void sliding_dots(int64_t rows, const SlidingRows& a, const Product<W>& b, const Target& to) {
  Buffer<float> weight(b.K);
  for (int64_t n = 0; n < b.N; n++) {
    for (int64_t k = 0; k < b.K; k++) weight[k] = widen(b.data[k * kColumns + n]);
    const Floats bias = splat(widen(b.data[b.K * kColumns + n]));
    for (int64_t begin = 0; begin < rows; begin += kLanes) {
      const float* x[kLanes];
      for (int64_t i = 0; i < kLanes; i++) x[i] = a.from(std::min(begin + i, rows - 1)).data;
      const Floats sums = sliding_dot(x, a, weight, b.K) + bias;
      for (int64_t r = begin; r < std::min(begin + kLanes, rows); r++) {
        float& out = to.at(r)[n];
        out = sums[r - begin] + (to.add ? out : 0.0f);
      }
    }
  }
  if (to.elu)
    for (int64_t r = 0; r < rows; r++) elu(to.at(r), b.N, to.at(r));
}

// The whole product by all threads: blocks of rows, and where these are few, groups of pairs of panels. With `odd` the
// first row is the second of a pair.
template <class W>
void sliding_product(int64_t rows, const SlidingRows& a, const Product<W>& b, const Target& to,
                     const ThreadPool& pool = {}, bool odd = false) {
  const int64_t row_pairs = (rows + odd + 1) / 2, blocks = (rows + kSlidingRows - 1) / kSlidingRows;
  const int64_t pairs = (b.panels() + 1) / 2;
  const int64_t groups = blocks >= 2 * pool.threads ? 1 : std::min<int64_t>(pool.threads, pairs);
  parallel(pool, blocks * groups, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t block = task % blocks, group = task / blocks;
      const int64_t r0 = std::max<int64_t>(0, row_pairs * block / blocks * 2 - odd);
      const int64_t r1 = std::min(rows, row_pairs * (block + 1) / blocks * 2 - odd);
      const int64_t p0 = pairs * group / groups * 2, p1 = std::min(pairs * (group + 1) / groups * 2, b.panels());
      if (b.N <= 2)
        sliding_dots(r1 - r0, a.from(r0), b, to.from(r0));
      else if (b.tap > 0)
        paired_panels(r1 - r0, odd && r0 == 0, a.from(r0), b, p0, p1, to.from(r0));
      else
        sliding_panels(r1 - r0, a.from(r0), b, p0, p1, to.from(r0));
    }
  });
}

#undef AAR_UNROLL

}  // namespace AAR_ISA
}  // namespace aar
