// Stacks of convolutions, block by block: a layer computes a block of steps as soon as its input is there, and the next
// layer takes them while they are in the cache.
#pragma once
#include <memory>
#include <vector>

#include "lstm.h"
#include "sliding.h"
#include "snake.h"
#include "time_norm.h"

namespace aar {
namespace AAR_ISA {

constexpr int64_t kBlockSteps = 384;   // of a layer's output that the next layer finds in the second-level cache
constexpr int64_t kResidualRows = 48;  // of a residual block, whose inner tensors then stay in the first-level cache
constexpr int64_t kResidualWeights = 1 << 18;  // no second-level cache holds more of them: more rows share a pass
constexpr int64_t kResidualSpans = 4;  // of its taps, at least: what they read around the rows is activated twice

inline int64_t residual_rows(const SeanetLayer& layer) {
  const int64_t least = layer.first_size() > kResidualWeights ? kSlidingRows : kResidualRows;
  return std::max(least, kResidualSpans * (layer.span() - 1));
}

// Steps of a transposed convolution's product that come before the output's first.
inline int64_t trim(const SeanetLayer& layer) {
  const bool trimmed = layer.padding == SeanetPadding::centered || layer.padding == SeanetPadding::symmetric;
  if (layer.kind != SeanetKind::transposed || !trimmed) return 0;
  const int64_t total = layer.kernel - layer.stride;
  return total - total / 2;
}

// Whether a layer reads this activation of its input: ELU is applied by whoever writes it, Snake once it is there. A
// residual block activates its input itself.
inline bool wants(const SeanetLayer& layer, SeanetActivation activation) {
  return layer.activation == activation && layer.kind != SeanetKind::residual;
}

// What a layer needs of its padded input. Step o of its product reads steps [o * stride, o * stride + span).
struct Geometry {
  int64_t left, right, stride, span;
  bool reflect, whole;  // whether the last stride is filled up
};
inline Geometry geometry(const SeanetLayer& layer) {
  const bool transposed = layer.kind == SeanetKind::transposed;
  const int64_t span = layer.span(), stride = transposed ? 1 : layer.stride;
  if (layer.padding == SeanetPadding::none) return {0, 0, stride, span, false, false};
  if (transposed)  // a step of its product reads what came before, zeros before the first
    return {span - 1, (trim(layer) + layer.stride - 1) / layer.stride, 1, span, false, false};
  const int64_t total = span - stride, right = layer.padding == SeanetPadding::causal ? 0 : total / 2;
  if (layer.padding == SeanetPadding::symmetric)
    return {total - right, total - right, stride, span, layer.reflect, false};
  return {total - right, right, stride, span, layer.reflect, true};
}

// What ends where a layer's input does.
enum class End { nothing, chunk, signal };

// The input of a layer, from the earliest step that is still needed.
class Signal {
 public:
  Signal(const Geometry& of, int64_t channels, int64_t margin, int64_t capacity)
      : of_(of), channels_(channels), margin_(margin), data_((margin + capacity) * channels) {}

  // Where step t of the input goes. Up to `margin` steps before the first are written in vain.
  float* at(int64_t t) { return padded(t + of_.left); }
  float* padded(int64_t p) { return data_ + (p - begin_ + margin_) * channels_; }

  // The last `steps` of the `received` that came with the chunks before.
  void restore(const float* state, int64_t steps, int64_t received) {
    received_ = received;
    begin_ = of_.left + received - steps;
    started_ = true;
    std::copy(state, state + steps * channels_, padded(begin_));
  }
  void save(float* state, int64_t steps) { std::copy(at(received_ - steps), at(received_), state); }

  // Input is there up to step `end`; with `last` none follows.
  void append(int64_t end, bool last) {
    received_ = end;
    if (!started_ && (last || !of_.reflect || received_ > of_.left)) {
      for (int64_t t = -of_.left; t < 0; t++) pad(t, received_);
      started_ = true;
    }
    padding_ = 0;
    if (!last) return;
    padding_ = of_.right + (of_.whole ? (of_.stride - received_ % of_.stride) % of_.stride : 0);
    // A signal that is shorter than its padding is reflected behind zeros, as EnCodec does.
    const int64_t length = std::max(received_, std::max(of_.left, padding_) + 1);
    for (int64_t t = received_; t < received_ + padding_; t++) pad(t, length);
  }

  int64_t received() const { return received_; }

  // Steps of the product that can be computed so far.
  int64_t ready() const {
    const int64_t end = started_ ? of_.left + received_ + padding_ : 0;
    return end < of_.span ? 0 : (end - of_.span) / of_.stride + 1;
  }

  // Forgets what no step from `done` on needs, nor the reflection at the end.
  void drop(int64_t done) {
    const int64_t end = of_.left + received_, kept = of_.reflect ? of_.right + of_.stride : 0;
    const int64_t begin = std::max(begin_, std::min(done * of_.stride, end - kept));
    if (begin == begin_ || !started_) return;
    std::copy(padded(begin), padded(end), data_ + margin_ * channels_);
    begin_ = begin;
  }

 private:
  void pad(int64_t t, int64_t length) {
    const int64_t source = !of_.reflect ? -1 : t < 0 ? -t : t < length ? t : 2 * (length - 1) - t;
    float* to = at(t);
    if (source < 0 || source >= received_)
      std::fill(to, to + channels_, 0.0f);
    else
      std::copy(at(source), at(source) + channels_, to);
  }

  Geometry of_;
  int64_t channels_, margin_;
  Buffer<float> data_;
  int64_t begin_ = 0;  // of data_ behind the margin, counted with padding
  int64_t received_ = 0, padding_ = 0;
  bool started_ = false;
};

// One item on its way through the layers, whose weights are W.
template <class W>
class Stack {
 public:
  Stack(const SeanetLayer* layers, int64_t count, int64_t length, int64_t block, const ThreadPool& pool)
      : layers_(layers), count_(count), pool_(pool), done_(count) {
    // The largest number of steps that each signal receives at once, and holds.
    int64_t margin = 0;
    source_block_ = block > 0 ? block : kBlockSteps * pool.threads;
    int64_t arriving = std::min(source_block_, length);
    for (int64_t i = 0; i < count; i++) {
      const SeanetLayer& layer = layers[i];
      const Geometry of = geometry(layer);
      const int64_t steps = std::min(block > 0 ? block : automatic_block(layer), length + of.span);
      const int64_t waiting = steps * of.stride + of.span + of.left + 2 * (of.right + of.stride) + 1;
      const int64_t before = std::max(of.left, layer.kept());
      const int64_t capacity = std::min(arriving + waiting, length + before + of.right + of.stride);
      signals_.push_back(std::make_unique<Signal>(of, layer.in, margin, capacity));
      blocks_.push_back(steps);
      snakes_.emplace_back(static_cast<const W*>(layer.alpha), layer.alpha_size() > 0 ? layer.in : 0);
      hidden_snakes_.emplace_back(static_cast<const W*>(layer.hidden_alpha),
                                  layer.hidden_alpha_size() > 0 ? layer.hidden : 0);
      const bool transposed = layer.kind == SeanetKind::transposed;
      margin = trim(layer);
      arriving = steps * (transposed ? layer.stride : 1);
      length = layer.length(length) + layer.kernel;  // those that are trimmed need room too
    }
    const SeanetLayer& last = layers[count - 1];
    const Geometry of{0, 0, 1, 1, false, false};
    signals_.push_back(std::make_unique<Signal>(of, last.out, margin, arriving + last.kernel));
  }

  void run(const float* x, int64_t length, float* out, const SeanetChunk& chunk) {
    out_ = out;
    if (chunk.position > 0) restore(chunk);
    const SeanetLayer& first = layers_[0];
    for (int64_t t = 0; t < length; t += source_block_) {
      const int64_t count = std::min(source_block_, length - t), step = chunk.position + t;
      if (wants(first, SeanetActivation::elu))
        elu(x + t * first.in, count * first.in, signals_[0]->at(step));
      else
        std::copy(x + t * first.in, x + (t + count) * first.in, signals_[0]->at(step));
      advance(0, step + count, t + count < length ? End::nothing : chunk.last ? End::signal : End::chunk);
    }
    if (!chunk.last) save(chunk.state);
  }

 private:
  // At least as many steps as share a block of the weights.
  int64_t automatic_block(const SeanetLayer& layer) const {
    const int64_t steps = kBlockSteps * pool_.threads;
    return std::max(kSlidingRows, steps / (layer.kind == SeanetKind::transposed ? layer.stride : 1));
  }

  void restore(const SeanetChunk& chunk) {
    const float* state = chunk.state;
    int64_t received = chunk.position;
    for (int64_t i = 0; i < count_; i++) {
      const SeanetLayer& layer = layers_[i];
      signals_[i]->restore(state, layer.kept(), received);
      state += layer.kept() * layer.in;
      done_[i] = received / geometry(layer).stride;
      received = layer.length(received);
    }
    signals_[count_]->restore(state, 0, received);
    written_ = received;
  }
  void save(float* state) {
    for (int64_t i = 0; i < count_; state += layers_[i].kept() * layers_[i].in, i++)
      signals_[i]->save(state, layers_[i].kept());
  }

  // Layer i's input is there up to step `end`.
  void advance(int64_t i, int64_t end, End what) {
    Signal& in = *signals_[i];
    if (i < count_ && wants(layers_[i], SeanetActivation::snake)) {
      float* x = in.at(in.received());
      const int64_t row = layers_[i].in;
      parallel(pool_, end - in.received(), [&](int64_t begin, int64_t last) {
        snakes_[i].apply(x + begin * row, row, last - begin, x + begin * row, row);
      });
    }
    in.append(end, what == End::signal);
    if (i == count_) {
      out_ = std::copy(in.at(written_), in.at(end), out_);
      written_ = end;
      return in.drop(end);
    }
    const SeanetLayer& layer = layers_[i];
    const int64_t ready = in.ready();
    int64_t& done = done_[i];
    for (bool ends = false; !ends && (what != End::nothing || ready - done >= blocks_[i]);) {
      const int64_t until = std::min(ready, done + blocks_[i]);
      ends = what != End::nothing && until == ready;
      compute(i, done, until);
      done = until;
      int64_t there = until;
      if (layer.kind == SeanetKind::transposed)
        there = std::max<int64_t>(0, std::min(until * layer.stride - trim(layer), layer.length(end)));
      if (there > 0 || ends) advance(i + 1, there, ends ? what : End::nothing);
    }
    in.drop(done);
  }

  // Steps [begin, end) of layer i's product.
  void compute(int64_t i, int64_t begin, int64_t end) {
    const SeanetLayer& layer = layers_[i];
    const bool transposed = layer.kind == SeanetKind::transposed;
    const bool elu_of_next = i + 1 < count_ && wants(layers_[i + 1], SeanetActivation::elu);
    const int64_t stride = geometry(layer).stride, first = transposed ? begin * layer.stride - trim(layer) : begin;
    const float* x = signals_[i]->padded(begin * stride);
    const Product<W> product = first_product(layer);
    const Target to{signals_[i + 1]->at(first), transposed ? product.N : layer.out, false, elu_of_next};
    if (layer.kind == SeanetKind::residual)
      residual(i, x, end - begin, to);
    else
      sliding_product(end - begin, rows(layer, x, stride * layer.in), product, to, pool_, begin % 2 != 0);
  }

  static Product<W> first_product(const SeanetLayer& layer) {
    return {static_cast<const W*>(layer.first), layer.first_K(), layer.first_N(), layer.tap()};
  }
  static Product<W> second_product(const SeanetLayer& layer) {
    return {static_cast<const W*>(layer.second), layer.second_K(), layer.out};
  }
  static SlidingRows rows(const SeanetLayer& layer, const float* a, int64_t row) {
    const bool dilated = layer.dilation > 1;
    return {a, row, dilated ? layer.in : layer.first_K(), dilated ? layer.dilation * layer.in : 0};
  }

  // out[steps] = [ELU, convolution, ELU, 1x1] + shortcut of x, or so with Snake. The 1x1 convolutions are one product:
  // [ELU(h) | x].
  void residual(int64_t i, const float* x, int64_t steps, const Target& to) const {
    const SeanetLayer& layer = layers_[i];
    const bool snake = layer.activation == SeanetActivation::snake;
    const Geometry of = geometry(layer);
    const int64_t most = residual_rows(layer), blocks = (steps + most - 1) / most, in = layer.in, hidden = layer.hidden;
    const int64_t width = layer.second_K(), centre_step = layer.padding == SeanetPadding::none ? of.span - 1 : of.left;
    parallel(pool_, blocks, [&](int64_t first, int64_t last) {
      Buffer<float> activated((most + of.span) * in), both(most * width);
      for (int64_t b = first; b < last; b++) {
        const int64_t begin = steps * b / blocks, count = steps * (b + 1) / blocks - begin;
        const float *block = x + begin * in, *centre = block + centre_step * in;
        if (snake)
          snakes_[i].apply(block, in, count + of.span - 1, activated, in);
        else
          elu(block, (count + of.span - 1) * in, activated);
        const Target out = to.from(begin);
        for (int64_t t = 0; t < count; t++)
          std::copy(centre + t * in, centre + (t + 1) * in, layer.shortcut ? both + t * width + hidden : out.at(t));
        sliding_product(count, rows(layer, activated, in), first_product(layer), {both, width, false, !snake});
        if (snake) hidden_snakes_[i].apply(both, width, count, both, width);
        sliding_product(count, {both, width, width, 0}, second_product(layer),
                        {out.data, out.row, !layer.shortcut, out.elu});
      }
    });
  }

  const SeanetLayer* layers_;
  int64_t count_;
  const ThreadPool& pool_;
  std::vector<std::unique_ptr<Signal>> signals_;  // what each layer reads, and the output
  std::vector<Snake> snakes_, hidden_snakes_;  // of each layer's input, and within; of no channels where it has none
  std::vector<int64_t> blocks_, done_;
  int64_t source_block_, written_ = 0;  // steps of x at once, and of the output that are there
  float* out_ = nullptr;
};

template <class W>
void stack_of(const SeanetLayer* layers, int64_t count, const float* x, int64_t batch, int64_t length, int64_t block,
              float* out, const SeanetChunk& chunk, const ThreadPool& pool) {
  int64_t out_length = length, state_item = 0;
  for (int64_t i = 0; i < count; i++) {
    out_length = layers[i].length(out_length);
    state_item += layers[i].kept() * layers[i].in;
  }
  const int64_t x_item = length * layers[0].in, out_item = out_length * layers[count - 1].out;
  const auto run = [&](int64_t begin, int64_t end, const ThreadPool& team) {
    for (int64_t item = begin; item < end; item++) {
      float* state = chunk.state == nullptr ? nullptr : chunk.state + item * state_item;
      Stack<W>(layers, count, length, block, team)
          .run(x + item * x_item, length, out + item * out_item, {state, chunk.position, chunk.last});
    }
  };
  // Whole items for each thread, and what is left for all of them together.
  const int64_t shared = batch / pool.threads * pool.threads;
  parallel(pool, shared, [&](int64_t begin, int64_t end) { run(begin, end, ThreadPool{}); });
  run(shared, batch, pool);
}

inline void seanet_stack(const SeanetLayer* layers, int64_t count, Element weights, const float* x, int64_t batch,
                         int64_t length, int64_t block, float* out, const SeanetChunk& chunk, const ThreadPool& pool) {
  const auto run = weights == Element::bfloat16 ? stack_of<BFloat16> : stack_of<float>;
  run(layers, count, x, batch, length, block, out, chunk, pool);
}

}  // namespace AAR_ISA
}  // namespace aar
