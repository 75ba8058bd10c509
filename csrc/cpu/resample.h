// Area pooling down to a scale, and the action of a scale's codes on the full-rate sequence.
#pragma once
#include "simd.h"

namespace aar {
namespace AAR_ISA {

// Where frame t of the full rate lies between rows i0 and i1 of n: linear interpolation, align_corners=False.
struct Position {
  int32_t i0, i1;
  float w0, w1;
};

inline void positions(int64_t n, int64_t length, bool repeat, Position* out) {
  for (int64_t t = 0; t < length; t++) {
    if (repeat) {
      const int32_t i = int32_t(t * n / length);
      out[t] = {i, i, 1.0f, 0.0f};
      continue;
    }
    double x = (t + 0.5) * double(n) / double(length) - 0.5;
    if (n == length) x = double(t);
    if (x < 0) x = 0;
    const int64_t i = int64_t(x) < n - 1 ? int64_t(x) : n - 1;
    const int64_t j = i + 1 < n ? i + 1 : i;
    const float w = float(x - double(i));
    out[t] = {int32_t(i), int32_t(j), 1.0f - w, j == i ? 0.0f : w};
    if (j == i) out[t].w0 = 1.0f;
  }
}

inline void add_scaled(float* out, const float* row, float weight, int64_t dim) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(out + d, fma(load(row + d), splat(weight), load(out + d)));
  for (; d < dim; d++) out[d] += row[d] * weight;
}

// Mean of x[length][dim], whose rows are `stride` apart, over the windows of rows [first, last) of n. `seen`, where given,
// holds for each t the number of real frames before it: masked frames are zero in x and do not count; a window without a
// real frame gives zeros.
inline void pool(const float* x, int64_t stride, int64_t length, int64_t dim, int64_t n, const int32_t* seen, float* out,
                 int64_t first, int64_t last) {
  if (n == length && stride == dim) {
    std::memcpy(out + first * dim, x + first * dim, sizeof(float) * (last - first) * dim);
    return;
  }
  for (int64_t i = first; i < last; i++) {
    const int64_t begin = i * length / n, end = ((i + 1) * length + n - 1) / n;
    const int64_t count = seen != nullptr ? seen[end] - seen[begin] : end - begin;
    const float weight = count > 0 ? 1.0f / float(count) : 0.0f;
    float* row = out + i * dim;
    std::memcpy(row, x + begin * stride, sizeof(float) * dim);
    if (n == length) continue;
    for (int64_t t = begin + 1; t < end; t++) add_scaled(row, x + t * stride, 1.0f, dim);
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(row + d, load(row + d) * splat(weight));
    for (; d < dim; d++) row[d] *= weight;
  }
}

template <int VECTORS>
inline void act_columns(const float* const* rows, const Position* at, int64_t taps, int64_t length, int64_t dim,
                        const float* bias, float sign, int64_t d, float* out, int64_t begin, int64_t end) {
  const int64_t half = taps / 2;
  for (int64_t t = begin; t < end; t++) {
    Floats sum[VECTORS];
    for (int v = 0; v < VECTORS; v++) sum[v] = bias != nullptr ? load(bias + d + v * kLanes) : splat(0.0f);
    const int64_t first = t < half ? half - t : 0, last = length - t + half < taps ? length - t + half : taps;
    for (int64_t tap = first; tap < last; tap++) {
      const Position& p = at[t + tap - half];
      const float* a = rows[p.i0] + tap * dim + d;
      const Floats w0 = splat(p.w0);
      if (p.w1 == 0.0f) {
        for (int v = 0; v < VECTORS; v++) sum[v] = fma(load(a + v * kLanes), w0, sum[v]);
        continue;
      }
      const float* b = rows[p.i1] + tap * dim + d;
      const Floats w1 = splat(p.w1);
      for (int v = 0; v < VECTORS; v++) sum[v] = fma(load(a + v * kLanes), w0, fma(load(b + v * kLanes), w1, sum[v]));
    }
    float* y = out + t * dim + d;
    for (int v = 0; v < VECTORS; v++) store(y + v * kLanes, fma(sum[v], splat(sign), load(y + v * kLanes)));
  }
}

// out[t] += sign * (bias + sum over taps of the interpolated row[tap]) for frames [begin, end) of out[length][dim]:
// rows[i] points to [taps][dim] of code i.
inline void act(const float* const* rows, const Position* at, int64_t taps, int64_t length, int64_t dim,
                const float* bias, float sign, float* out, int64_t begin, int64_t end) {
  int64_t d = 0;
  for (; d + 8 * kLanes <= dim; d += 8 * kLanes)
    act_columns<8>(rows, at, taps, length, dim, bias, sign, d, out, begin, end);
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes)
    act_columns<4>(rows, at, taps, length, dim, bias, sign, d, out, begin, end);
  for (; d + kLanes <= dim; d += kLanes)
    act_columns<1>(rows, at, taps, length, dim, bias, sign, d, out, begin, end);
  const int64_t half = taps / 2;
  for (; d < dim; d++) {
    for (int64_t t = begin; t < end; t++) {
      float sum = bias != nullptr ? bias[d] : 0.0f;
      for (int64_t tap = 0; tap < taps; tap++) {
        const int64_t u = t + tap - half;
        if (u < 0 || u >= length) continue;
        sum += rows[at[u].i0][tap * dim + d] * at[u].w0 + rows[at[u].i1][tap * dim + d] * at[u].w1;
      }
      out[t * dim + d] += sign * sum;
    }
  }
}

// The adjoint of `act` with one tap: adds to grad_rows[slots[i]][dim] what the row of code i did to frames [begin, end) of
// g[length][dim].
inline void act_adjoint(const float* g, const Position* at, int64_t begin, int64_t end, int64_t dim,
                        const int32_t* slots, float* grad_rows) {
  for (int64_t t = begin; t < end; t++) {
    add_scaled(grad_rows + slots[at[t].i0] * dim, g + t * dim, at[t].w0, dim);
    if (at[t].w1 != 0.0f) add_scaled(grad_rows + slots[at[t].i1] * dim, g + t * dim, at[t].w1, dim);
  }
}

}  // namespace AAR_ISA
}  // namespace aar
