// The way back through one layer of a stack, item by item. Of the way there nothing is kept but the layer's input.
//
// The input, padded, lies in rows of `width` floats (a stride of a convolution's steps), and step r of the product reads
// rows r, r + dilation, ..., one for each tap. So the gradient of the input is again a product over rows that overlap,
// those of the output's gradient, by the weights of the taps in reverse order, each transposed; and the weights' is a
// product of the input, transposed once for all taps, with the output's gradient.
#pragma once
#include "seanet_kernels.h"

namespace aar {
namespace AAR_ISA {

constexpr int64_t kGradientWidth = 96;  // of the input at once, whose weights' gradient then stays in the caches
constexpr int64_t kGradientSteps = 1024;  // of a signal that are worth a share of a small gradient
constexpr int64_t kGradientShares = 8, kSmallGradient = 1 << 14;

struct Window {
  int64_t left, right, width, taps, dilation, steps;
  int64_t halo() const { return (taps - 1) * dilation; }
  int64_t rows() const { return steps + halo(); }
};

inline Window window(const SeanetLayer& layer, int64_t length) {
  const Geometry of = geometry(layer);
  if (layer.kind == SeanetKind::transposed)
    return {of.left, of.left, layer.in, layer.taps(), 1, length + of.left};
  const int64_t filled = (of.stride - length % of.stride) % of.stride, taps = (layer.kernel + of.stride - 1) / of.stride;
  return {of.left, of.right + filled, of.stride * layer.in, taps, layer.dilation, layer.length(length)};
}

// out[columns][rows] = in[rows][columns].
inline void transpose(const float* in, int64_t in_row, int64_t rows, int64_t columns, float* out, int64_t out_row) {
  const int64_t whole_rows = rows / kLanes * kLanes, whole_columns = columns / kLanes * kLanes;
  for (int64_t r = 0; r < whole_rows; r += kLanes)
    for (int64_t c = 0; c < whole_columns; c += kLanes) {
      Floats block[kLanes];
      for (int i = 0; i < kLanes; i++) block[i] = load(in + (r + i) * in_row + c);
      transpose(block);
      for (int i = 0; i < kLanes; i++) store(out + (c + i) * out_row + r, block[i]);
    }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; c++) out[c * out_row + r] = in[r * in_row + c];
}

// The product that takes gradients back through b, whose taps read `width` floats each.
class Adjoint {
 public:
  Adjoint(const Product<float>& b, int64_t taps, int64_t width, int64_t dilation, const ThreadPool& pool)
      : product_{nullptr, taps * b.N, width}, data_(product_.panels() * product_.panel()) {
    product_.data = data_;
    const bool pairs = taps > 1 && dilation == 1 && width % kColumns == 0;
    if (pairs && std::min(b.N, width) >= kSeanetPairedWidth) product_.tap = b.N;
    parallel(pool, product_.panels(), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++) pack(b, taps, width, p);
    });
  }
  const Product<float>& product() const { return product_; }

 private:
  void pack(const Product<float>& b, int64_t taps, int64_t width, int64_t p) {
    float* panel = data_ + p * product_.panel();
    std::fill(panel, panel + product_.panel(), 0.0f);
    for (int64_t tap = 0; tap < taps; tap++)
      for (int64_t n = 0; n < b.N; n += kColumns) {
        const int64_t k = tap * width + p * kColumns, rows = std::min({kColumns, width - p * kColumns, b.K - k});
        if (rows > 0)
          transpose(b.weights(n, k, rows, false).panel, kColumns, rows, std::min(kColumns, b.N - n),
                    panel + ((taps - 1 - tap) * b.N + n) * kColumns, kColumns);
      }
  }

  Product<float> product_;
  Buffer<float> data_;
};

// gradient[panels][K + 1][16] += the input, transposed, times dy[steps][N]; its last row the sums of dy.
inline void add_weights_gradient(int64_t steps, const float* x, const Window& of, const float* dy, int64_t K, int64_t N,
                                 int64_t p0, int64_t p1, int64_t w0, int64_t w1, float* gradient) {
  const int64_t room = std::min(steps, kSlidingDepth);
  Buffer<float> across((w1 - w0) * (room + of.halo())), panel(room * kColumns);
  for (int64_t r = 0, depth; r < steps; r += depth) {
    depth = std::min(kSlidingDepth, steps - r);
    const int64_t row = depth + of.halo();
    transpose(x + r * of.width + w0, of.width, row, w1 - w0, across, row);
    for (int64_t p = p0; p < p1; p++) {
      const int64_t columns = std::min(kColumns, N - p * kColumns);
      float* to = gradient + p * (K + 1) * kColumns;
      float sums[kColumns] = {};
      for (int64_t t = 0; t < depth; t++) {
        const float* from = dy + (r + t) * N + p * kColumns;
        for (int64_t i = 0; i < kColumns; i++) panel[t * kColumns + i] = i < columns ? from[i] : 0.0f;
        for (int64_t i = 0; i < kColumns; i++) sums[i] += panel[t * kColumns + i];
      }
      for (int64_t i = 0; w0 == 0 && i < kColumns; i++) to[K * kColumns + i] += sums[i];
      const Weights<float> weights{panel, 0, depth, 0, nullptr};
      if (of.width == 1)  // taps take the place of channels
        sliding_block(K, across, of.dilation, weights, kColumns, {to, kColumns, true, false});
      else
        for (int64_t tap = 0, k = w0; tap < of.taps && k < K; tap++, k += of.width)
          sliding_block(std::min(w1 - w0, K - k), across + tap * of.dilation, row, weights, kColumns,
                        {to + k * kColumns, kColumns, true, false});
    }
  }
}

// The same by all threads. Sums do not depend on how many there are: a small gradient is always taken in shares.
inline void weights_gradient(const float* x, const Window& of, const float* dy, int64_t K, int64_t N, float* gradient,
                             const ThreadPool& pool) {
  const int64_t panels = (N + kColumns - 1) / kColumns, size = panels * (K + 1) * kColumns;
  const int64_t shares =
      size > kSmallGradient ? 1 : std::clamp(of.steps / kGradientSteps, int64_t(1), kGradientShares);
  const int64_t blocks = (of.width + kGradientWidth - 1) / kGradientWidth;
  const int64_t groups = shares > 1 || blocks >= pool.threads ? 1 : std::min<int64_t>(pool.threads, panels);
  Buffer<float> others((shares - 1) * size);
  if (shares > 1) std::fill(others + 0, others + (shares - 1) * size, 0.0f);
  parallel(pool, shares * blocks * groups, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t share = task / blocks / groups, block = task / groups % blocks, group = task % groups;
      const int64_t r0 = of.steps * share / shares, r1 = of.steps * (share + 1) / shares;
      add_weights_gradient(r1 - r0, x + r0 * of.width, of, dy + r0 * N, K, N, panels * group / groups,
                           panels * (group + 1) / groups, of.width * block / blocks, of.width * (block + 1) / blocks,
                           share == 0 ? gradient : others + (share - 1) * size);
    }
  });
  for (int64_t share = 1; share < shares; share++)
    for (int64_t i = 0; i < size; i++) gradient[i] += others[(share - 1) * size + i];
}

inline void copy_rows(int64_t rows, const float* in, int64_t in_row, int64_t n, float* out, int64_t out_row) {
  for (int64_t r = 0; r < rows; r++) std::copy(in + r * in_row, in + r * in_row + n, out + r * out_row);
}

class LayerBackward {
 public:
  LayerBackward(const SeanetLayer& layer, int64_t length, bool needs_x, float* gradient, const ThreadPool& pool)
      : layer_(layer),
        length_(length),
        of_(window(layer, length)),
        first_{static_cast<const float*>(layer.first), layer.first_K(), layer.first_N(), layer.tap()},
        second_{static_cast<const float*>(layer.second), layer.second_K(), layer.out},
        back_(first_, of_.taps, of_.width, of_.dilation, pool),
        gradient_(gradient),
        pool_(pool),
        padded_(of_.rows() * of_.width),
        dy_((of_.rows() + of_.halo()) * first_.N),
        dx_(needs_x ? of_.rows() * of_.width : 0),
        both_(is_residual() ? of_.steps * second_.K : 0),
        dboth_(is_residual() ? of_.steps * second_.K : 0) {
    std::fill(dy_ + 0, dy_ + (of_.rows() + of_.halo()) * first_.N, 0.0f);
    if (is_residual()) second_back_ = std::make_unique<Adjoint>(second_, 1, second_.K, 1, pool);
  }

  // Of one item. dx is null if nobody wants it.
  void run(const float* x, const float* dy, float* dx) {
    pad(x);
    float* centre = dy_ + of_.halo() * first_.N;
    if (is_residual())
      second_product(x, dy, centre);
    else if (layer_.kind == SeanetKind::transposed)
      std::copy(dy, dy + length_ * first_.N, centre + trim(layer_) * layer_.out);
    else
      std::copy(dy, dy + of_.steps * first_.N, centre);
    weights_gradient(padded_, of_, centre, first_.K, first_.N, gradient_, pool_);
    if (dx == nullptr) return;
    const int64_t N = first_.N, run = of_.dilation > 1 ? N : of_.taps * N;
    sliding_product(of_.rows(), {dy_, N, run, of_.dilation * N}, back_.product(), {dx_, of_.width, false, false}, pool_);
    fold();
    const int64_t in = layer_.in, hidden = layer_.hidden;
    const float *from = dx_ + of_.left * in, *activated = padded_ + of_.left * in;
    for_steps([&](int64_t t0, int64_t t1) {
      if (activates())
        multiply_by_slope(from + t0 * in, activated + t0 * in, (t1 - t0) * in, dx + t0 * in);
      else
        std::copy(from + t0 * in, from + t1 * in, dx + t0 * in);
      if (is_residual())
        for (int64_t t = t0; t < t1; t++) {
          const float* also = layer_.shortcut ? dboth_ + t * second_.K + hidden : dy + t * in;
          for (int64_t i = 0; i < in; i++) dx[t * in + i] += also[i];
        }
    });
  }

 private:
  bool is_residual() const { return layer_.kind == SeanetKind::residual; }
  bool activates() const { return layer_.elu || is_residual(); }

  template <class F>
  void for_steps(const F& f) const {
    const int64_t blocks = (length_ + kBlockSteps - 1) / kBlockSteps;
    parallel(pool_, blocks, [&](int64_t begin, int64_t end) {
      f(length_ * begin / blocks, length_ * end / blocks);
    });
  }

  // d ELU(x) / dx is 1 where x is positive, else e^x, which is ELU(x) + 1.
  static void multiply_by_slope(const float* from, const float* activated, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i++) out[i] = from[i] * (activated[i] > 0.0f ? 1.0f : activated[i] + 1.0f);
  }

  // For each step of padding that mirrors another of the signal: f(step of padding, step of the signal).
  template <class F>
  void for_mirrored(const F& f) const {
    if (!geometry(layer_).reflect) return;
    const int64_t mirror = std::max(length_ - 1, std::max(of_.left, of_.right));
    for (int64_t t = 1; t <= std::min(of_.left, length_ - 1); t++) f(of_.left - t, of_.left + t);
    for (int64_t t = length_; t < length_ + of_.right; t++)
      if (2 * mirror - t >= 0 && 2 * mirror - t < length_) f(of_.left + t, of_.left + 2 * mirror - t);
  }

  void pad(const float* x) {
    const int64_t in = layer_.in, end = of_.rows() * of_.width;
    std::fill(padded_ + 0, padded_ + of_.left * in, 0.0f);
    std::fill(padded_ + (of_.left + length_) * in, padded_ + end, 0.0f);
    for_steps([&](int64_t t0, int64_t t1) {
      float* to = padded_ + (of_.left + t0) * in;
      if (activates())
        elu(x + t0 * in, (t1 - t0) * in, to);
      else
        std::copy(x + t0 * in, x + t1 * in, to);
    });
    for_mirrored([&](int64_t p, int64_t source) { copy_rows(1, padded_ + source * in, 0, in, padded_ + p * in, 0); });
  }
  void fold() {
    const int64_t in = layer_.in;
    for_mirrored([&](int64_t p, int64_t source) {
      for (int64_t i = 0; i < in; i++) dx_[source * in + i] += dx_[p * in + i];
    });
  }

  // Of a residual block: back to what the first convolution gave, which is computed again.
  void second_product(const float* x, const float* dy, float* dhidden) {
    const int64_t in = layer_.in, hidden = layer_.hidden, K = second_.K, out = layer_.out;
    const int64_t run = of_.dilation > 1 ? in : first_.K;
    sliding_product(of_.steps, {padded_, in, run, of_.dilation * in}, first_, {both_, K, false, true}, pool_);
    if (layer_.shortcut) copy_rows(of_.steps, x, in, in, both_ + hidden, K);
    float* gradient = gradient_ + layer_.first_size();
    weights_gradient(both_, {0, 0, K, 1, 1, of_.steps}, dy, K, out, gradient, pool_);
    sliding_product(of_.steps, {dy, out, out, 0}, second_back_->product(), {dboth_, K, false, false}, pool_);
    for_steps([&](int64_t t0, int64_t t1) {
      for (int64_t t = t0; t < t1; t++)
        multiply_by_slope(dboth_ + t * K, both_ + t * K, hidden, dhidden + t * hidden);
    });
  }

  const SeanetLayer& layer_;
  int64_t length_;
  Window of_;
  Product<float> first_, second_;
  Adjoint back_;
  std::unique_ptr<Adjoint> second_back_;
  float* gradient_;
  const ThreadPool& pool_;
  Buffer<float> padded_, dy_, dx_, both_, dboth_;
};

// Items one after the other, each by all threads: then sums over items have one order.
inline void seanet_backward(const SeanetLayer& layer, const float* x, const float* dy, int64_t batch, int64_t length,
                            float* dx, float* gradient, const ThreadPool& pool) {
  std::fill(gradient, gradient + layer.first_size() + layer.second_size(), 0.0f);
  LayerBackward backward(layer, length, dx != nullptr, gradient, pool);
  const int64_t x_item = length * layer.in, dy_item = layer.length(length) * layer.out;
  for (int64_t item = 0; item < batch; item++)
    backward.run(x + item * x_item, dy + item * dy_item, dx == nullptr ? nullptr : dx + item * x_item);
}

}  // namespace AAR_ISA
}  // namespace aar

// Where a level's file instantiates the table of kernels.
#define AAR_DEFINE_SEANET(LEVEL) \
  const aar::SeanetKernels aar::seanet_kernels_##LEVEL = {AAR_ISA::seanet_stack, AAR_ISA::seanet_backward, \
                                                           AAR_ISA::lstm, AAR_ISA::time_norm};
