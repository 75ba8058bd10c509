// Area pooling down to a scale, and the action of a scale's codes on the full-rate sequence.
#pragma once
#include "device.h"
#include "msrq.h"

namespace aar::cuda {

// (a * b + c) / d of numbers that are not negative. A 64-bit division takes a hundred instructions: only where needed.
AAR_DEVICE int scale_down(int a, int b, int c, int d) {
  const uint64_t product = uint64_t(a) * uint64_t(b) + uint64_t(c);
  return product >> 32 == 0 ? int(uint32_t(product) / uint32_t(d)) : int(product / uint64_t(d));
}

// A frame between tokens `left` and `left + 1` of a scale, nearer to the right one by `weight`.
struct Position {
  int left;
  float weight;
};

// Linear interpolation, align_corners=False, of n tokens to `length` frames. In integers up to the last division, so
// that it is exact at any length.
AAR_DEVICE Position position_of(int frame, int n, int length) {
  if (n == length) return {frame, 0};
  const int64_t twice = (2 * int64_t(frame) + 1) * n - length;
  if (twice <= 0) return {0, 0};
  const uint64_t whole = 2 * uint64_t(length);
  const int left = twice >> 32 == 0 ? int(uint32_t(twice) / uint32_t(whole)) : int(uint64_t(twice) / whole);
  if (left >= n - 1) return {n - 1, 0};
  return {left, float(twice - left * int64_t(whole)) / float(whole)};
}

// The frames that token i of n is the mean of.
AAR_DEVICE int window_begin(int i, int n, int length) { return scale_down(i, length, 0, n); }
AAR_DEVICE int window_end(int i, int n, int length) { return scale_down(i + 1, length, n - 1, n); }

// What four channels of `codes[n]` add to frame t: the bias and, over the taps of phi, the interpolated rows of the
// codes. `positions[i]` is that of frame `first + i`. A code of -1 is a row of zeros. Loads of TAPS_AT_ONCE taps are
// under way at once.
template <int TAPS_AT_ONCE>
AAR_DEVICE float4 contribution(const Tables& tables, const Scale& scale, const int* codes, const Position* positions,
                               int first, int t, int length, int channel) {
  const float* rows = tables.rows + int64_t(scale.table) * tables.codes * tables.taps * tables.dim;
  const int half = tables.taps / 2, n = scale.length;
  const int begin = t < half ? half - t : 0, end = length - t + half < tables.taps ? length - t + half : tables.taps;
  float4 sum = {0, 0, 0, 0};
  if (tables.bias != nullptr) sum = load_channels(tables.bias + scale.kernel * tables.dim, channel, tables.dim);
  const auto row = [&](int code, int tap) {
    if (code < 0) return float4{0, 0, 0, 0};
    return load_channels(rows + (int64_t(code) * tables.taps + tap) * tables.dim, channel, tables.dim);
  };
  if (n == length) {
#pragma unroll TAPS_AT_ONCE
    for (int tap = begin; tap < end; tap++) sum = add(sum, row(codes[t + tap - half], tap));
    return sum;
  }
  // Both rows even where one has no weight: without a branch the loads of several taps are under way at once.
#pragma unroll TAPS_AT_ONCE
  for (int tap = begin; tap < end; tap++) {
    const Position p = positions[t + tap - half - first];
    const float4 left = row(codes[p.left], tap), right = row(codes[p.left + 1 < n ? p.left + 1 : p.left], tap);
    sum = add_scaled(add_scaled(sum, left, 1.0f - p.weight), right, p.weight);
  }
  return sum;
}

}  // namespace aar::cuda
