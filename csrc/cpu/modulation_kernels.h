// Adaptive layer normalisation: several passes over a row, of which the first reads memory and the others L1.
#pragma once
#include <algorithm>
#include <cmath>

#include "aar/modulation.h"
#include "storage.h"

namespace aar {
namespace AAR_ISA {

constexpr int kUnroll = 4;  // vectors of a step, each with sums of its own, so that additions do not wait for each other
constexpr int64_t kStep = kUnroll * kLanes;
constexpr int64_t kBlockRows = 32;  // rows that share a partial sum: fixed, so that no sum depends on the threads

inline int64_t whole_steps(int64_t channels) { return (channels + kStep - 1) / kStep * kStep; }
inline int64_t blocks_of(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

// A row as the loops below see it: fp32, in whole steps, with zeros behind the channels.
class RowBuffer {
 public:
  explicit RowBuffer(int64_t channels) : channels_(channels), copy_(whole_steps(channels)) {}

  // Row i, in place where it is stored as the loops want it.
  const float* read(const Rows& rows, int64_t i) {
    if (is_direct(rows)) return row<float>(rows, i);
    switch (rows.element) {
      case Element::float32: load_row(row<float>(rows, i), channels_, copy_.get()); break;
      case Element::bfloat16: load_row(row<BFloat16>(rows, i), channels_, copy_.get()); break;
      case Element::float16: load_row(row<Float16>(rows, i), channels_, copy_.get()); break;
    }
    fill_end(0.0f);
    return copy_;
  }

  // Where to write row i, and what then brings it to where it is stored.
  float* target(const Rows& rows, int64_t i) { return is_direct(rows) ? row<float>(rows, i) : copy_.get(); }
  void write(const Rows& rows, int64_t i) {
    if (is_direct(rows)) return;
    switch (rows.element) {
      case Element::float32: store_row(copy_.get(), channels_, row<float>(rows, i)); break;
      case Element::bfloat16: store_row(copy_.get(), channels_, row<BFloat16>(rows, i)); break;
      case Element::float16: store_row(copy_.get(), channels_, row<Float16>(rows, i)); break;
    }
  }

  // The value of what lies behind the channels. A row that is in place has nothing there.
  void fill_end(float value) { std::fill(copy_ + channels_, copy_ + whole_steps(channels_), value); }

 private:
  bool is_direct(const Rows& rows) const { return rows.element == Element::float32 && channels_ % kStep == 0; }
  template <class T>
  static T* row(const Rows& rows, int64_t i) {
    return static_cast<T*>(rows.data) + i * rows.stride;
  }

  int64_t channels_;
  Buffer<float> copy_;
};

// Sums over a row; term(c, sums) adds those of the vector at channel c.
template <int kSums, class Term>
inline void sum_row(int64_t n, float (&out)[kSums], const Term& term) {
  Floats sums[kUnroll][kSums] = {};
  for (int64_t c = 0; c < n; c += kStep)
    for (int k = 0; k < kUnroll; k++) term(c + k * kLanes, sums[k]);
  for (int i = 0; i < kSums; i++) out[i] = sum_lanes((sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]));
}

struct Statistics {
  float mean, rstd;
};

// In two passes, of which the second also corrects the mean by what its rounding left: differences from a mean are
// small numbers, even where the mean is large. `x` has its end in `buffer`, if it has one.
inline Statistics statistics(const float* x, RowBuffer& buffer, int64_t channels, float eps) {
  const int64_t n = whole_steps(channels);
  float total[1], differences[2];
  sum_row(n, total, [&](int64_t c, Floats* sums) { sums[0] += load(x + c); });
  const float mean = total[0] / float(channels);
  buffer.fill_end(mean);
  sum_row(n, differences, [&](int64_t c, Floats* sums) {
    const Floats d = load(x + c) - splat(mean);
    sums[0] += d;
    sums[1] = fma(d, d, sums[1]);
  });
  const float correction = differences[0] / float(channels);
  const float variance = differences[1] / float(channels) - correction * correction;
  return {mean + correction, 1.0f / std::sqrt(variance + eps)};
}

inline void add_gated(const float* x, const float* gate, const float* y, int64_t n, float* out) {
  for (int64_t c = 0; c < n; c += kLanes) store(out + c, fma(load(gate + c), load(y + c), load(x + c)));
}

inline void modulate(const float* x, Statistics of, const float* scale, const float* shift, int64_t n, float* out) {
  for (int64_t c = 0; c < n; c += kLanes) {
    const Floats normal = (load(x + c) - splat(of.mean)) * splat(of.rstd);
    store(out + c, fma(normal, load(scale + c) + splat(1.0f), load(shift + c)));
  }
}

inline void forward(const ModulationShape& shape, const ModulationForward& t, const ThreadPool& pool) {
  const int64_t channels = shape.channels, n = whole_steps(channels), rows = shape.batch * shape.tokens;
  parallel(pool, blocks_of(rows), [&](int64_t begin, int64_t end) {
    RowBuffer x_row(channels), y_row(channels), gate_row(channels), scale_row(channels), shift_row(channels),
        modulated_row(channels);
    const float *gate = nullptr, *scale = nullptr, *shift = nullptr;
    int64_t item = -1;
    for (int64_t i = begin * kBlockRows; i < std::min(end * kBlockRows, rows); i++) {
      if (item != i / shape.tokens) {
        item = i / shape.tokens;
        if (t.y.data) gate = gate_row.read(t.gate, item);
        scale = scale_row.read(t.scale, item);
        shift = shift_row.read(t.shift, item);
      }
      const float* x = x_row.read(t.x, i);
      if (t.y.data) {
        add_gated(x, gate, y_row.read(t.y, i), n, x_row.target(t.x_new, i));
        x_row.write(t.x_new, i);
        x = x_row.read(t.x_new, i);  // as it was rounded
      }
      const Statistics of = statistics(x, x_row, channels, t.eps);
      t.statistics[2 * i] = of.mean;
      t.statistics[2 * i + 1] = of.rstd;
      modulate(x, of, scale, shift, n, modulated_row.target(t.modulated, i));
      modulated_row.write(t.modulated, i);
    }
  });
}

// One row of the backward pass, in fp32. gate, y, grad_y and gate_sum are null where there is no gate.
struct BackwardRow {
  const float *grad_x_new, *grad_modulated, *x, *y, *gate, *scale;
  Statistics of;
  float *grad_x, *grad_y, *scale_sum, *shift_sum, *gate_sum;
};

inline void backward_row(const BackwardRow& r, int64_t channels, int64_t n) {
  const Floats mean = splat(r.of.mean), rstd = splat(r.of.rstd);
  const auto normal = [&](int64_t c) { return (load(r.x + c) - mean) * rstd; };
  const auto grad_normal = [&](int64_t c) { return load(r.grad_modulated + c) * (load(r.scale + c) + splat(1.0f)); };
  float means[2];  // over the channels: of the gradient by the normalised row, and of that times the row
  sum_row(n, means, [&](int64_t c, Floats* sums) {
    const Floats grad = load(r.grad_modulated + c), value = normal(c), by_normal = grad_normal(c);
    store(r.scale_sum + c, fma(grad, value, load(r.scale_sum + c)));
    store(r.shift_sum + c, load(r.shift_sum + c) + grad);
    sums[0] += by_normal;
    sums[1] = fma(by_normal, value, sums[1]);
  });
  const Floats first = splat(-means[0] / float(channels)), second = splat(-means[1] / float(channels));
  const auto grad_x = [&](int64_t c) {
    return fma(rstd, fma(normal(c), second, grad_normal(c) + first), load(r.grad_x_new + c));
  };
  if (r.gate == nullptr) {
    for (int64_t c = 0; c < n; c += kLanes) store(r.grad_x + c, grad_x(c));
    return;
  }
  for (int64_t c = 0; c < n; c += kLanes) {
    const Floats grad = grad_x(c);
    store(r.grad_x + c, grad);
    store(r.grad_y + c, grad * load(r.gate + c));
    store(r.gate_sum + c, fma(grad, load(r.y + c), load(r.gate_sum + c)));
  }
}

inline void backward(const ModulationShape& shape, const ModulationBackward& t, const ThreadPool& pool) {
  const int64_t channels = shape.channels, n = whole_steps(channels), blocks = blocks_of(shape.tokens);
  const int64_t kinds = t.y.data ? 3 : 2;
  Buffer<float> partial(shape.batch * blocks * kinds * n);
  parallel(pool, shape.batch * blocks, [&](int64_t begin, int64_t end) {
    RowBuffer grad_x_new(channels), grad_modulated(channels), x(channels), y(channels), gate(channels),
        scale(channels), grad_x(channels), grad_y(channels);
    Buffer<float> zeros(n);
    std::fill(zeros.get(), zeros + n, 0.0f);
    for (int64_t block = begin; block < end; block++) {
      const int64_t item = block / blocks, first = block % blocks * kBlockRows;
      float* sums = partial + block * kinds * n;
      std::fill(sums, sums + kinds * n, 0.0f);
      BackwardRow r{};
      r.grad_x_new = zeros;
      r.scale = scale.read(t.scale, item);
      r.scale_sum = sums;
      r.shift_sum = sums + n;
      if (t.y.data) {
        r.gate = gate.read(t.gate, item);
        r.gate_sum = sums + 2 * n;
      }
      for (int64_t token = first; token < std::min(first + kBlockRows, shape.tokens); token++) {
        const int64_t i = item * shape.tokens + token;
        if (t.grad_x_new.data) r.grad_x_new = grad_x_new.read(t.grad_x_new, i);
        r.grad_modulated = grad_modulated.read(t.grad_modulated, i);
        r.x = x.read(t.x, i);
        r.of = {t.statistics[2 * i], t.statistics[2 * i + 1]};
        r.grad_x = grad_x.target(t.grad_x, i);
        if (t.y.data) {
          r.y = y.read(t.y, i);
          r.grad_y = grad_y.target(t.grad_y, i);
        }
        backward_row(r, channels, n);
        grad_x.write(t.grad_x, i);
        if (t.y.data) grad_y.write(t.grad_y, i);
      }
    }
  });
  parallel(pool, kinds * shape.batch, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t kind = i / shape.batch, item = i % shape.batch;
      float* __restrict out = t.sums + i * channels;
      std::fill(out, out + channels, 0.0f);
      for (int64_t block = item * blocks; block < (item + 1) * blocks; block++) {
        const float* part = partial + (block * kinds + kind) * n;
        for (int64_t c = 0; c < channels; c++) out[c] += part[c];
      }
    }
  });
}

}  // namespace AAR_ISA
}  // namespace aar

// Where a level's file instantiates the table of kernels.
#define AAR_DEFINE_MODULATION(LEVEL) \
  const aar::ModulationKernels aar::modulation_kernels_##LEVEL = {AAR_ISA::forward, AAR_ISA::backward};
