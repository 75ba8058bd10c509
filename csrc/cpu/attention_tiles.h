// What the passes of attention are made of: rows in fp32, panels, and products that leave out what a row does not see.
//
// A scale's tokens all see the same keys. So row i sees keys [0, end[i]), and key j is seen by rows [begin[j], tokens);
// both are non-decreasing. No mask is stored: a tile of rows goes through the keys in segments that end where the number
// of rows that see them changes. An unseen value is therefore never multiplied, not even by zero: it may be NaN.
#pragma once
#include <algorithm>
#include <cmath>

#include "aar/attention.h"
#include "gemm.h"
#include "storage.h"

namespace aar {
namespace AAR_ISA {

constexpr int64_t kChunk = 128;  // rows of a panel that stay in the first-level cache while tiles pass over them
constexpr float kLeastNorm = 1e-12f;  // of torch.nn.functional.normalize

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// One head of one item.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  T* operator[](int64_t i) const { return data + i * stride; }
};

template <class T>
inline Rows<T> rows_of(const Heads& heads, int64_t item, int64_t head) {
  return {static_cast<T*>(heads.data) + item * heads.batch + head * heads.head, heads.token};
}

// Scratch in which what no one writes is zero: the channels that pad a row to whole vectors.
struct Zeroed : Buffer<float> {
  explicit Zeroed(int64_t n) : Buffer<float>(n) { std::memset(get(), 0, sizeof(float) * n); }
};

inline float dot(const float* a, const float* b, int64_t wide) {
  Floats sum = splat(0.0f);
  for (int64_t d = 0; d < wide; d += kLanes) sum = fma(load(a + d), load(b + d), sum);
  return sum_lanes(sum);
}

// out[wide] = factor * row, or factor * row / |row|; returns |row| (1 where there is no normalisation). Divides, as
// multiplying by 1 / |row| would round twice, which logits of 100 turn into an error of 1e-5 in the weights.
template <class T>
inline float load_scaled(const T* row, int64_t dim, int64_t wide, bool normalise, float factor, float* out) {
  load_row(row, dim, out);
  const float norm = normalise ? std::fmax(std::sqrt(dot(out, out, wide)), kLeastNorm) : 1.0f;
  for (int64_t d = 0; d < wide; d += kLanes)
    store(out + d, (normalise ? load(out + d) / splat(norm) : load(out + d)) * splat(factor));
  return norm;
}

// The way back through load_scaled: `grad` by its result becomes that by the row, and is stored. Returns the derivative
// by the logarithm of the factor.
template <class T>
inline float backward_scaled(const T* row, int64_t dim, int64_t wide, bool normalise, float factor, float* grad,
                             float* unit, T* out) {
  float along = 0.0f, norm = 1.0f, removed = 0.0f;
  if (normalise) {
    norm = load_scaled(row, dim, wide, true, 1.0f, unit);
    along = dot(unit, grad, wide);
    if (norm > kLeastNorm) removed = along;  // else the norm is a constant
  }
  const Floats times = splat(factor / norm);
  for (int64_t d = 0; d < wide; d += kLanes) {
    const Floats g = load(grad + d);
    store(grad + d, (normalise ? fma(splat(-removed), load(unit + d), g) : g) * times);
  }
  store_row(grad, dim, out);
  return along * factor;
}

// Panels are [wide / kTileColumns][depth][kTileColumns]: rows first..first + count of `depth` rows.
inline void pack_rows(const float* rows, int64_t count, int64_t wide, int64_t depth, int64_t first, float* panels) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t d = 0; d < wide; d += kTileColumns)
      std::memcpy(panels + d * depth + (first + i) * kTileColumns, rows + i * wide + d, sizeof(float) * kTileColumns);
}

// One panel [wide][kTileColumns] whose columns are the rows[kTileColumns][wide].
inline void pack_columns(const float* rows, int64_t wide, float* panel) {
  for (int part = 0; part < kTileColumns; part += kLanes)
    for (int64_t d = 0; d < wide; d += kLanes) {
      Floats block[kLanes];
      for (int i = 0; i < kLanes; i++) block[i] = load(rows + (part + i) * wide + d);
      transpose(block);
      for (int i = 0; i < kLanes; i++) store(panel + (d + i) * kTileColumns + part, block[i]);
    }
}

// out[rows][stride] = a[rows][wide] . panels, in the columns that a tile's last row sees, and a few more.
inline void logits(int64_t rows, const int64_t* end, const float* a, int64_t dim, int64_t wide, const float* panels,
                   float* out, int64_t stride) {
  for (int64_t j = 0; j < end[rows - 1]; j += kTileColumns)
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const int count = int(std::min<int64_t>(kTileRows, rows - i));
      if (end[i + count - 1] > j)
        gemm_edge<kTileRows, false>(count, a + i * wide, wide, 1, panels + j * wide, kTileColumns, dim,
                                    out + i * stride + j, stride);
    }
}

// out[rows][wide] += a[rows][stride] . panels of [depth] rows, row i over its [0, end[i]).
inline void weighted_sums(int64_t rows, const int64_t* end, const float* a, int64_t stride, const float* panels,
                          int64_t depth, int64_t wide, float* out) {
  for (int64_t first = 0; first < end[rows - 1]; first += kChunk)
    for (int64_t d = 0; d < wide; d += kTileColumns)
      for (int64_t i = 0; i < rows; i += kTileRows) {
        const int64_t last = std::min(i + kTileRows, rows);
        for (int64_t r = i, from = first; r < last;) {
          const int64_t to = std::min(end[r], first + kChunk);
          if (from < to)
            gemm_edge<kTileRows>(int(last - r), a + r * stride + from, stride, 1,
                                 panels + d * depth + from * kTileColumns, kTileColumns, to - from,
                                 out + r * wide + d, wide);
          from = std::max(from, to);
          do r++;
          while (r < last && end[r] <= from);
        }
      }
}

// out[keys][wide] += transpose of a[rows][stride] . panels of [depth] rows; key j over the rows from begin[j] - row on.
inline void transposed_sums(int64_t rows, int64_t row, int64_t keys, const int64_t* begin, const float* a,
                            int64_t stride, const float* panels, int64_t depth, int64_t wide, float* out) {
  const auto first = [&](int64_t key) { return std::max<int64_t>(begin[key] - row, 0); };
  for (int64_t j = 0; j < keys; j += kTileRows)
    for (int64_t d = 0; d < wide; d += kTileColumns)
      for (int64_t last = std::min(j + kTileRows, keys), to = rows; last > j;) {
        const int64_t from = first(last - 1);
        if (from < to)
          gemm_edge<kTileRows>(int(last - j), a + from * stride + j, 1, stride,
                               panels + d * depth + from * kTileColumns, kTileColumns, to - from, out + j * wide + d,
                               wide);
        to = std::min(from, to);
        do last--;
        while (last > j && first(last - 1) == from);
      }
}

// row[0, end) becomes e^(row - largest); returns the sum, and the logarithm of the sum of e^row.
inline float softmax(float* row, int64_t end, float* lse) {
  const int64_t padded = round_up(end, kLanes);
  for (int64_t j = end; j < padded; j++) row[j] = -INFINITY;
  Floats top = load(row), sum = splat(0.0f);
  for (int64_t j = kLanes; j < padded; j += kLanes) top = max(top, load(row + j));
  const float largest = max_lane(top);
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Floats e = exp(load(row + j) - splat(largest));
    store(row + j, e);
    sum += e;
  }
  const float total = sum_lanes(sum);
  *lse = largest + std::log(total);
  return total;
}

// From logits and the gradients by weights of [0, end) to the weights and the gradients by logits. A large lse has few
// digits behind the point, so weights are divided by their sum once more: without it their common error would not
// cancel in the gradients.
inline void backward_softmax(float* row, float* grad, int64_t end, float lse) {
  const int64_t padded = round_up(end, kLanes);
  for (int64_t j = end; j < padded; j++) row[j] = -INFINITY, grad[j] = 0.0f;
  Floats sum = splat(0.0f), products = splat(0.0f);
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Floats weight = exp(load(row + j) - splat(lse));
    store(row + j, weight);
    sum += weight;
    products = fma(weight, load(grad + j), products);
  }
  const float inverse = 1.0f / sum_lanes(sum);
  const Floats mean = splat(sum_lanes(products) * inverse);
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Floats weight = load(row + j) * splat(inverse);
    store(row + j, weight);
    store(grad + j, weight * (load(grad + j) - mean));
  }
}

}  // namespace AAR_ISA
}  // namespace aar
