// Scales of two dimensions: the rows of a sequence are the cells of a grid, row by row. And what hides from the drivers
// whether a scale is a grid.
//
// Bicubic interpolation and a square phi are separable in the indices, though phi's taps are not: cell (y, x) is
//   bias + sum over (i, dy) and (j, dx) of u(y; i, dy) u(x; j, dx) row[i, j][dy][dx],
// u(t; i, d) being the weight of row i at position t + d - taps / 2 where that lies inside, else 0. One axis has at most
// 4 x taps such terms. For a line of cells the sum over (i, dy) is taken once for every column j of the scale, and then
// summed over (j, dx) for every cell: no convolution, and no image of the interpolated codes.
#pragma once
#include <cmath>

#include "aar/msrq.h"
#include "resample.h"

namespace aar {
namespace AAR_ISA {

struct Grid {
  int64_t height, width;
};

inline Grid grid_of(const Shape& shape, int64_t s) { return {shape.lengths[s] / shape.widths[s], shape.widths[s]}; }

// The terms u(t; i, d) of each position t of an axis.
class Axis {
 public:
  struct Term {
    int32_t row, tap;
    float weight;
  };

  Axis(int64_t length, int64_t taps) : length_(length), taps_(taps), terms_(length * taps * 4), ends_(length) {}

  // For `n` rows.
  void plan(int64_t n) {
    int64_t count = 0;
    for (int64_t t = 0; t < length_; t++) {
      for (int64_t tap = 0; tap < taps_; tap++) {
        const int64_t u = t + tap - taps_ / 2;
        if (u < 0 || u >= length_) continue;
        double weights[4];
        const int64_t first = cubic(n, u, weights);
        for (int64_t k = 0, begin = count; k < 4; k++) {
          // Beyond the ends the outermost row stands for the others.
          const int64_t i = first + k < 0 ? 0 : first + k < n ? first + k : n - 1;
          const float weight = float(weights[k]);
          if (count > begin && terms_[count - 1].row == i) terms_[count - 1].weight += weight;
          else if (weight != 0.0f) terms_[count++] = {int32_t(i), int32_t(tap), weight};
        }
      }
      ends_[t] = int32_t(count);
    }
  }

  const Term* begin(int64_t t) const { return terms_ + (t > 0 ? ends_[t - 1] : 0); }
  const Term* end(int64_t t) const { return terms_ + ends_[t]; }

 private:
  // Keys' cubic convolution with a = -0.75, align_corners=False; returns the first of four rows.
  int64_t cubic(int64_t n, int64_t u, double* weights) const {
    const double a = -0.75, x = n == length_ ? double(u) : (u + 0.5) * double(n) / double(length_) - 0.5;
    const double floor = std::floor(x), t = x - floor;
    const auto near = [&](double d) { return ((a + 2) * d - (a + 3)) * d * d + 1; };
    const auto far = [&](double d) { return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a; };
    weights[0] = far(t + 1);
    weights[1] = near(t);
    weights[2] = near(1 - t);
    weights[3] = far(2 - t);
    return int64_t(floor) - 1;
  }

  const int64_t length_, taps_;
  Buffer<Term> terms_;
  Buffer<int32_t> ends_;
};

// Means of tokens [first, last) of a grid `to`, over the cells x[height][width][dim], which are `stride` apart, of `from`.
inline void pool_grid(const float* x, int64_t stride, Grid from, int64_t dim, Grid to, float* out, int64_t first,
                      int64_t last) {
  for (int64_t token = first; token < last; token++) {
    const int64_t i = token / to.width, j = token % to.width;
    const int64_t top = i * from.height / to.height, bottom = ((i + 1) * from.height + to.height - 1) / to.height;
    const int64_t left = j * from.width / to.width, right = ((j + 1) * from.width + to.width - 1) / to.width;
    float* row = out + token * dim;
    std::memset(row, 0, sizeof(float) * dim);
    const float weight = 1.0f / float((bottom - top) * (right - left));
    for (int64_t y = top; y < bottom; y++)
      for (int64_t t = left; t < right; t++) add_scaled(row, x + (y * from.width + t) * stride, 1.0f, dim);
    for (int64_t d = 0; d < dim; d++) row[d] *= weight;
  }
}

// out[n] = start + the sum of weights[k] * sources[k][n]; with ADD, `sign` times that is added to out. `start` may be null.
// Unrolled from the start: else the compiler keeps the sums in memory at both ends of the loop.
template <bool ADD, int VECTORS>
__attribute__((noinline)) void blend_columns(const float* const* sources, const float* weights, int64_t count,
                                             const float* start, float sign, int64_t d, float* out) {
  Floats sum[VECTORS];
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; v++) sum[v] = start != nullptr ? load(start + d + v * kLanes) : splat(0.0f);
  for (int64_t k = 0; k < count; k++) {
    const float* source = sources[k] + d;
    const Floats weight = splat(weights[k]);
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) sum[v] = fma(load(source + v * kLanes), weight, sum[v]);
  }
  float* y = out + d;
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; v++)
    store(y + v * kLanes, ADD ? fma(sum[v], splat(sign), load(y + v * kLanes)) : sum[v]);
}

template <bool ADD>
inline void blend(const float* const* sources, const float* weights, int64_t count, const float* start, float sign,
                  int64_t n, float* out) {
  int64_t d = 0;
  for (; d + 8 * kLanes <= n; d += 8 * kLanes) blend_columns<ADD, 8>(sources, weights, count, start, sign, d, out);
  for (; d + 4 * kLanes <= n; d += 4 * kLanes) blend_columns<ADD, 4>(sources, weights, count, start, sign, d, out);
  for (; d + kLanes <= n; d += kLanes) blend_columns<ADD, 1>(sources, weights, count, start, sign, d, out);
  for (; d < n; d++) {
    float sum = start != nullptr ? start[d] : 0.0f;
    for (int64_t k = 0; k < count; k++) sum += sources[k][d] * weights[k];
    out[d] = ADD ? out[d] + sign * sum : sum;
  }
}

// Pooling down to a scale, and the action of a scale's codes, of sequences and of grids alike. Of up to `workers` threads
// that act at a time each has scratch of its own.
class Resampler {
 public:
  Resampler(const Shape& shape, int64_t taps, int64_t length, int64_t workers)
      : shape_(shape), length_(length), taps_(taps), side_(shape.widths == nullptr ? 0 : side(taps)),
        finest_(shape.widths == nullptr ? Grid{0, 0} : grid_of(shape, shape.scales - 1)), scale_{0, 0},
        at_(shape.widths == nullptr ? length : 0), rows_(finest_.height, side_), columns_(finest_.width, side_),
        terms_(4 * side_), line_size_(widest(shape) * side_ * shape.dim), line_(workers * line_size_),
        sources_(workers * terms_), weights_(workers * terms_) {}

  // Prepares `act` for scale s.
  void plan(int64_t s) {
    if (shape_.widths == nullptr) return positions(shape_.lengths[s], length_, shape_.repeat, at_);
    scale_ = grid_of(shape_, s);
    rows_.plan(scale_.height);
    columns_.plan(scale_.width);
  }

  // As `pool` of resample.h, for tokens [first, last) of scale s.
  void pool(int64_t s, const float* x, int64_t stride, int64_t dim, const int32_t* seen, float* out, int64_t first,
            int64_t last) const {
    if (shape_.widths == nullptr)
      return AAR_ISA::pool(x, stride, length_, dim, shape_.lengths[s], seen, out, first, last);
    pool_grid(x, stride, finest_, dim, grid_of(shape_, s), out, first, last);
  }

  // As `act` of resample.h, for the scale that was planned.
  void act(const float* const* rows, int64_t dim, const float* bias, float sign, float* out, int64_t begin, int64_t end,
           int64_t worker) {
    if (shape_.widths == nullptr) return AAR_ISA::act(rows, at_, taps_, length_, dim, bias, sign, out, begin, end);
    const int64_t width = finest_.width, wide = side_ * dim;
    float* line = line_ + worker * line_size_;
    const float** sources = sources_ + worker * terms_;
    float* weights = weights_ + worker * terms_;
    for (int64_t y = begin / width; y * width < end; y++) {
      for (int64_t j = 0; j < scale_.width; j++) {
        int64_t count = 0;
        for (const Axis::Term* term = rows_.begin(y); term != rows_.end(y); term++, count++) {
          sources[count] = rows[term->row * scale_.width + j] + term->tap * wide;
          weights[count] = term->weight;
        }
        blend<false>(sources, weights, count, nullptr, 1.0f, wide, line + j * wide);
      }
      const int64_t first = y * width < begin ? begin - y * width : 0;
      const int64_t last = (y + 1) * width > end ? end - y * width : width;
      for (int64_t x = first; x < last; x++) {
        int64_t count = 0;
        for (const Axis::Term* term = columns_.begin(x); term != columns_.end(x); term++, count++) {
          sources[count] = line + term->row * wide + term->tap * dim;
          weights[count] = term->weight;
        }
        blend<true>(sources, weights, count, bias, sign, dim, out + (y * width + x) * dim);
      }
    }
  }

 private:
  static int64_t side(int64_t taps) { return std::llround(std::sqrt(double(taps))); }
  static int64_t widest(const Shape& shape) {
    int64_t width = 0;
    for (int64_t s = 0; shape.widths != nullptr && s < shape.scales; s++)
      width = shape.widths[s] > width ? shape.widths[s] : width;
    return width;
  }

  const Shape& shape_;
  const int64_t length_, taps_, side_;
  const Grid finest_;
  Grid scale_;
  Buffer<Position> at_;
  Axis rows_, columns_;
  const int64_t terms_, line_size_;
  Buffer<float> line_;
  Buffer<const float*> sources_;
  Buffer<float> weights_;
};

}  // namespace AAR_ISA
}  // namespace aar
