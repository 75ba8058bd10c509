// The way back through one layer of a stack, block by block. Of the way there nothing is kept but the layer's input.
//
// The input, padded, is rows of `width` floats (as many steps as a convolution's stride), and step r of the product reads
// rows r, r + dilation, ..., one for each tap. So the gradient of the input is again a product over rows that overlap,
// those of the output's gradient, by the weights of the taps in reverse order, each transposed; and the weights' is a
// product of the input, transposed once for all taps, with the output's gradient.
#pragma once
#include "seanet_kernels.h"

namespace aar {
namespace AAR_ISA {

constexpr int64_t kGradientWidth = 96;  // of the input at once, whose weights' gradient then stays in the caches
constexpr int64_t kSmallGradient = 1 << 14;  // of so few numbers that threads share steps instead: they are summed up
constexpr int64_t kGradientShares = 8;       // in as many shares whatever the number of threads, so that sums are the same

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

inline int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// out[columns][rows] = in[rows][columns]; rows of the result are filled up to whole vectors by zeros.
inline void transpose(const float* in, int64_t in_row, int64_t rows, int64_t columns, float* out, int64_t out_row) {
  const int64_t whole = columns / kLanes * kLanes;
  for (int64_t r = 0; r < rows; r += kLanes) {
    const float* from[kLanes];
    for (int i = 0; i < kLanes; i++) from[i] = in + std::min(r + i, rows - 1) * in_row;
    const int64_t count = std::min<int64_t>(kLanes, rows - r);
    for (int64_t c = 0; c < whole; c += kLanes) {
      Floats block[kLanes];
      for (int i = 0; i < kLanes; i++) block[i] = i < count ? load(from[i] + c) : splat(0.0f);
      transpose(block);
      for (int i = 0; i < kLanes; i++) store(out + (c + i) * out_row + r, block[i]);
    }
    for (int64_t c = whole; c < columns; c++)
      for (int i = 0; i < kLanes; i++) out[c * out_row + r + i] = i < count ? from[i][c] : 0.0f;
  }
}

// The product that takes gradients back through b.
class Adjoint {
 public:
  Adjoint(const Product<float>& b, const Window& of, const ThreadPool& pool)
      : product_{nullptr, of.taps * b.N, of.width}, data_(product_.panels() * product_.panel()) {
    product_.data = data_;
    const bool pairs = of.taps > 1 && of.dilation == 1 && of.width % kColumns == 0;
    if (pairs && std::min(b.N, of.width) >= kSeanetPairedWidth) product_.tap = b.N;
    parallel(pool, product_.panels(), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++) pack(b, of.taps, of.width, p);
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

// The gradient of a product's weights, gradient[panels][K + 1][16], from chunks of steps. Which numbers are added up in
// which order depends neither on the blocks in which chunks arrive nor on the number of threads.
class WeightsGradient {
 public:
  WeightsGradient(int64_t K, int64_t N, const Window& of, float* gradient, const ThreadPool& pool)
      : K_(K), N_(N), panels_((N + kColumns - 1) / kColumns), size_(panels_ * (K + 1) * kColumns), of_(of),
        shares_(size_ > kSmallGradient ? 1 : kGradientShares), pool_(pool), gradient_(gradient),
        others_((shares_ - 1) * size_) {
    std::fill(gradient_, gradient_ + size_, 0.0f);
    std::fill(others_ + 0, others_ + (shares_ - 1) * size_, 0.0f);
  }

  // x[steps + halo][width] and dy[steps][N]. Unless it is an item's last, `steps` is whole chunks.
  void add(int64_t steps, const float* x, const float* dy) {
    const int64_t blocks = (of_.width + kGradientWidth - 1) / kGradientWidth;
    const int64_t groups = shares_ > 1 || blocks >= pool_.threads ? 1 : std::min<int64_t>(pool_.threads, panels_);
    parallel(pool_, shares_ * blocks * groups, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; task++) {
        const int64_t share = task / blocks / groups, block = task / groups % blocks, group = task % groups;
        const Part part{panels_ * group / groups, panels_ * (group + 1) / groups, of_.width * block / blocks,
                        of_.width * (block + 1) / blocks};
        float* to = share == 0 ? gradient_ : others_ + (share - 1) * size_;
        Buffer<float> across((part.w1 - part.w0) * whole_vectors(kSlidingDepth + of_.halo()));
        Buffer<float> panel(kSlidingDepth * kColumns);
        for (int64_t r = 0, chunk = chunks_; r < steps; r += kSlidingDepth, chunk++)
          if (chunk % shares_ == share)
            add_chunk(std::min(kSlidingDepth, steps - r), x + r * of_.width, dy + r * N_, part, across, panel, to);
      }
    });
    chunks_ += (steps + kSlidingDepth - 1) / kSlidingDepth;
  }

  void finish() {
    for (int64_t share = 1; share < shares_; share++)
      for (int64_t i = 0; i < size_; i++) gradient_[i] += others_[(share - 1) * size_ + i];
  }

 private:
  struct Part {
    int64_t p0, p1, w0, w1;  // panels, and floats of a row of x
  };

  void add_chunk(int64_t depth, const float* x, const float* dy, const Part& part, float* across, float* panel,
                 float* gradient) const {
    const int64_t rows = depth + of_.halo(), row = whole_vectors(rows), width = part.w1 - part.w0;
    transpose(x + part.w0, of_.width, rows, width, across, row);
    for (int64_t p = part.p0; p < part.p1; p++) {
      const int64_t columns = std::min(kColumns, N_ - p * kColumns);
      float* to = gradient + p * (K_ + 1) * kColumns;
      take_panel(depth, dy + p * kColumns, columns, panel);
      if (part.w0 == 0) add_columns(depth, panel, to + K_ * kColumns);  // the bias
      const Weights<float> weights{panel, 0, depth, 0, nullptr};
      if (of_.width == 1)  // taps take the place of channels
        sliding_block(K_, across, of_.dilation, weights, columns, {to, kColumns, true, false});
      else
        for (int64_t tap = 0, k = part.w0; tap < of_.taps && k < K_; tap++, k += of_.width)
          sliding_block(std::min(width, K_ - k), across + tap * of_.dilation, row, weights, columns,
                        {to + k * kColumns, kColumns, true, false});
    }
  }

  void take_panel(int64_t depth, const float* dy, int64_t columns, float* panel) const {
    if (columns < kColumns) std::fill(panel, panel + depth * kColumns, 0.0f);
    for (int64_t t = 0; t < depth; t++)
      if (columns == kColumns)  // a constant: a copy of two vectors
        std::copy(dy + t * N_, dy + t * N_ + kColumns, panel + t * kColumns);
      else
        std::copy(dy + t * N_, dy + t * N_ + columns, panel + t * kColumns);
  }

  static void add_columns(int64_t depth, const float* panel, float* out) {
    for (int64_t i = 0; i < kColumns; i += kLanes) {
      Floats sum = splat(0.0f);
      for (int64_t t = 0; t < depth; t++) sum += load(panel + t * kColumns + i);
      store(out + i, load(out + i) + sum);
    }
  }

  int64_t K_, N_, panels_, size_;
  Window of_;
  int64_t shares_, chunks_ = 0;
  const ThreadPool& pool_;
  float* gradient_;
  Buffer<float> others_;
};

// d ELU(x) / dx is 1 where x is positive, else e^x, which is ELU(x) + 1.
inline void multiply_by_slope(const float* from, const float* activated, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i++) out[i] = from[i] * (activated[i] > 0.0f ? 1.0f : activated[i] + 1.0f);
}

class LayerBackward {
 public:
  LayerBackward(const SeanetLayer& layer, int64_t length, float* gradient, const ThreadPool& pool)
      : layer_(layer), length_(length), of_(window(layer, length)), pool_(pool),
        residual_(layer.kind == SeanetKind::residual), elu_(layer.activation == SeanetActivation::elu),
        reflect_(geometry(layer).reflect),
        first_{static_cast<const float*>(layer.first), layer.first_K(), layer.first_N(), layer.tap()},
        second_{static_cast<const float*>(layer.second), residual_ ? layer.second_K() : 0, residual_ ? layer.out : 0},
        back_(first_, of_, pool), second_back_(second_, {0, 0, second_.K, 1, 1, 0}, pool),
        first_gradient_(first_.K, first_.N, of_, gradient, pool),
        second_gradient_(second_.K, second_.N, {0, 0, second_.K, 1, 1, 0}, gradient + layer.first_size(), pool),
        // Whole chunks, and so many that what mirrors a step of padding is in the padding's block.
        block_(kSlidingDepth * std::max(kBlockSteps / kSlidingDepth * pool.threads,
                                        2 * std::max(of_.left, of_.right) * layer.in / of_.width / kSlidingDepth + 1)),
        room_(std::min(of_.rows(), 2 * block_) + of_.halo()),
        padded_((room_ + of_.halo()) * of_.width), dy_(room_ * first_.N), dx_(room_ * of_.width),
        both_(room_ * second_.K), dboth_(room_ * second_.K) {}

  // One item. dx is null if nobody wants it.
  void run(const float* x, const float* dy, float* dx) {
    for (int64_t begin = 0, end; begin < of_.rows(); begin = end) {
      end = of_.rows() - begin < 2 * block_ ? of_.rows() : begin + block_;
      block(begin, end, x, dy, dx);
    }
  }

  void finish() {
    first_gradient_.finish();
    if (residual_) second_gradient_.finish();
  }

 private:
  // Rows [begin, end) of the padded input, and what the same steps of the product add to the gradient of its weights.
  void block(int64_t begin, int64_t end, const float* x, const float* dy, float* dx) {
    const int64_t halo = of_.halo(), N = first_.N, first = std::max<int64_t>(0, residual_ ? begin - halo : begin);
    const int64_t in = layer_.in, per_row = of_.width / in, steps = std::min(end, of_.steps) - begin;
    pad(x, first * per_row, std::min(of_.rows(), end + halo) * per_row);
    const float* input = padded_ + (begin - first) * of_.width;
    // Of steps [begin - halo, end).
    const float* behind = residual_ ? hidden_gradient(first, begin, end, x, dy) : gradient_rows(begin - halo, end, dy);
    if (steps > 0) first_gradient_.add(steps, input, behind + halo * N);
    if (dx == nullptr) return;
    const int64_t run = of_.dilation > 1 ? N : of_.taps * N;
    sliding_product(end - begin, {behind, N, run, of_.dilation * N}, back_.product(), {dx_, of_.width, false, false},
                    pool_);
    const int64_t p0 = begin * per_row, t0 = std::max(p0, of_.left) - of_.left;
    const int64_t t1 = std::min(end * per_row - of_.left, length_);
    for_mirrored(p0, end * per_row, [&](int64_t p, int64_t source) {
      for (int64_t i = 0; i < in; i++) dx_[(source - p0) * in + i] += dx_[(p - p0) * in + i];
    });
    parallel(pool_, std::max<int64_t>(0, t1 - t0), [&](int64_t from, int64_t until) {
      const int64_t t = t0 + from, count = (until - from) * in, at = (of_.left + t - p0) * in;
      if (elu_)
        multiply_by_slope(dx_ + at, input + at, count, dx + t * in);
      else
        std::copy(dx_ + at, dx_ + at + count, dx + t * in);
      if (!residual_) return;
      const int64_t row = layer_.shortcut ? second_.K : in;
      const float* also = layer_.shortcut ? dboth_ + (t - first) * row + layer_.hidden : dy + t * row;
      for (int64_t r = t; r < t0 + until; r++, also += row)
        for (int64_t i = 0; i < in; i++) dx[r * in + i] += also[i];
    });
  }

  // f(step of padding, the step that it mirrors), counted with padding, for those in [p0, p1).
  template <class F>
  void for_mirrored(int64_t p0, int64_t p1, const F& f) const {
    if (!reflect_) return;
    const int64_t end = of_.left + length_, mirror = of_.left + std::max({length_ - 1, of_.left, of_.right});
    for (int64_t p = p0; p < std::min(p1, of_.left); p++)
      if (2 * of_.left - p < end) f(p, 2 * of_.left - p);
    for (int64_t p = std::max(p0, end); p < std::min(p1, end + of_.right); p++)
      if (2 * mirror - p >= of_.left && 2 * mirror - p < end) f(p, 2 * mirror - p);
  }

  // Steps [p0, p1) of the padded input, after ELU.
  void pad(const float* x, int64_t p0, int64_t p1) {
    const int64_t in = layer_.in, begin = std::clamp(of_.left, p0, p1), end = std::clamp(of_.left + length_, p0, p1);
    std::fill(padded_ + 0, padded_ + (begin - p0) * in, 0.0f);
    std::fill(padded_ + (end - p0) * in, padded_ + (p1 - p0) * in, 0.0f);
    const auto take = [&](int64_t p, int64_t source, int64_t count) {
      const float* from = x + (source - of_.left) * in;
      if (elu_)
        elu(from, count * in, padded_ + (p - p0) * in);
      else
        std::copy(from, from + count * in, padded_ + (p - p0) * in);
    };
    parallel(pool_, end - begin, [&](int64_t from, int64_t until) { take(begin + from, begin + from, until - from); });
    for_mirrored(p0, p1, [&](int64_t p, int64_t source) { take(p, source, 1); });
  }

  // Rows [begin, end) of the product's gradient, zeros where there is none.
  const float* gradient_rows(int64_t begin, int64_t end, const float* dy) {
    const int64_t N = first_.N, before = trim(layer_) * layer_.out, total = layer_.length(length_) * layer_.out;
    const int64_t from = begin * N - before, until = end * N - before;
    if (from >= 0 && until <= total) return dy + from;
    const int64_t first = std::clamp<int64_t>(0, from, until), last = std::clamp(total, from, until);
    std::fill(dy_ + 0, dy_ + (until - from), 0.0f);
    std::copy(dy + first, dy + last, dy_ + (first - from));
    return dy_;
  }

  // Of a residual block, whose padded input is there from row `first` on: back to what the first convolution gave, which
  // is computed again, for steps [begin - halo, end).
  const float* hidden_gradient(int64_t first, int64_t begin, int64_t end, const float* x, const float* dy) {
    const int64_t in = layer_.in, hidden = layer_.hidden, K = second_.K, out = layer_.out, halo = of_.halo();
    const int64_t last = std::min(end, of_.steps), count = std::max<int64_t>(0, last - first);
    const int64_t run = of_.dilation > 1 ? in : first_.K;
    sliding_product(count, {padded_, in, run, of_.dilation * in}, first_, {both_, K, false, true}, pool_);
    for (int64_t t = 0; layer_.shortcut && t < count; t++)
      std::copy(x + (first + t) * in, x + (first + t + 1) * in, both_ + t * K + hidden);
    if (last > begin) second_gradient_.add(last - begin, both_ + (begin - first) * K, dy + begin * out);
    sliding_product(count, {dy + first * out, out, out, 0}, second_back_.product(), {dboth_, K, false, false}, pool_);
    std::fill(dy_ + 0, dy_ + (end - begin + halo) * hidden, 0.0f);
    parallel(pool_, count, [&](int64_t from, int64_t until) {
      for (int64_t t = from; t < until; t++)
        multiply_by_slope(dboth_ + t * K, both_ + t * K, hidden, dy_ + (first + t - begin + halo) * hidden);
    });
    return dy_;
  }

  const SeanetLayer& layer_;
  int64_t length_;
  Window of_;
  const ThreadPool& pool_;
  bool residual_, elu_, reflect_;
  Product<float> first_, second_;
  Adjoint back_, second_back_;
  WeightsGradient first_gradient_, second_gradient_;
  int64_t block_, room_;
  Buffer<float> padded_, dy_, dx_, both_, dboth_;
};

// Items one after the other, each by all threads: then sums over items have one order.
inline void seanet_backward(const SeanetLayer& layer, const float* x, const float* dy, int64_t batch, int64_t length,
                            float* dx, float* gradient, const ThreadPool& pool) {
  LayerBackward backward(layer, length, gradient, pool);
  const int64_t x_item = length * layer.in, dy_item = layer.length(length) * layer.out;
  for (int64_t item = 0; item < batch; item++)
    backward.run(x + item * x_item, dy + item * dy_item, dx == nullptr ? nullptr : dx + item * x_item);
  backward.finish();
}

}  // namespace AAR_ISA
}  // namespace aar

// Where a level's file instantiates the table of kernels.
#define AAR_DEFINE_SEANET(LEVEL) \
  const aar::SeanetKernels aar::seanet_kernels_##LEVEL = {AAR_ISA::seanet_stack, AAR_ISA::seanet_backward, \
                                                           AAR_ISA::lstm, AAR_ISA::time_norm};
