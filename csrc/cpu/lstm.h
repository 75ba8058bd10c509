// LSTM over a batch: the input products of many steps at once, then step by step the recurrent one, which reads each
// weight once for all items.
#pragma once
#include <memory>
#include <vector>

#include "sliding.h"

namespace aar {
namespace AAR_ISA {

constexpr int64_t kGates = 4, kGroup = kGates * kColumns;  // columns of 16 units
constexpr int64_t kLstmRows = 256;                          // steps times items of an input product

inline Floats sigmoid(Floats x) {
  const Floats e = exp(x < splat(0.0f) ? x : -x), one = splat(1.0f);
  return (x < splat(0.0f) ? e : one) / (one + e);
}
inline Floats tanh(Floats x) {
  const Floats e = elu(splat(-2.0f) * (x < splat(0.0f) ? -x : x)), y = e / (splat(-2.0f) - e);  // e = e^-2|x| - 1
  return x < splat(0.0f) ? -y : y;
}

// The state of one layer: h of the step before and of this one, and c, units padded to whole groups.
struct LstmState {
  // before[h, c][batch][units], or null for zeros.
  LstmState(const float* before, int64_t batch, int64_t units, int64_t padded)
      : h(2 * batch * units), c(batch * padded) {
    std::fill(h.get(), h + 2 * batch * units, 0.0f);
    std::fill(c.get(), c + batch * padded, 0.0f);
    if (before == nullptr) return;
    std::copy(before, before + batch * units, h.get());
    for (int64_t b = 0; b < batch; b++, before += units)
      std::copy(before + batch * units, before + (batch + 1) * units, c + b * padded);
  }
  void save(int64_t steps, int64_t batch, int64_t units, int64_t padded, float* after) const {
    const float* last = h + steps % 2 * batch * units;
    std::copy(last, last + batch * units, after);
    for (int64_t b = 0; b < batch; b++, after += units)
      std::copy(c + b * padded, c + b * padded + units, after + batch * units);
  }
  Buffer<float> h, c;
};

// One step of a group's units: gates[batch][kGroup] and c[batch][...] -> h.
inline void lstm_units(int64_t batch, const float* gates, float* c, int64_t c_row, int64_t units, float* h,
                       int64_t h_row) {
  for (int64_t b = 0; b < batch; b++) {
    float out[kColumns];
    for (int64_t u = 0; u < kColumns; u += kLanes) {
      const float* gate = gates + b * kGroup + u;
      const Floats input = sigmoid(load(gate)), forget = sigmoid(load(gate + kColumns));
      const Floats cell = tanh(load(gate + 2 * kColumns)), output = sigmoid(load(gate + 3 * kColumns));
      const Floats state = fma(forget, load(c + b * c_row + u), input * cell);
      store(c + b * c_row + u, state);
      store(out + u, output * tanh(state));
    }
    std::copy(out, out + units, h + b * h_row);
  }
}

template <class W>
void lstm_of(const LstmLayer* layers, int64_t count, const float* x, int64_t batch, int64_t length, int64_t units,
             bool skip, const float* before, float* out, float* after, const ThreadPool& pool) {
  const int64_t groups = (units + kColumns - 1) / kColumns, padded = groups * kColumns, row = batch * units;
  const int64_t steps = std::min(length, std::max<int64_t>(1, kLstmRows / batch));
  std::vector<std::unique_ptr<LstmState>> states;
  for (int64_t i = 0; i < count; i++) {
    const float* state = before == nullptr ? nullptr : before + 2 * i * row;
    states.push_back(std::make_unique<LstmState>(state, batch, units, padded));
  }
  // [step][item][...]: a layer's input, which its output replaces, and the gates.
  Buffer<float> signal(steps * row), gates(steps * batch * groups * kGroup);
  for (int64_t begin = 0; begin < length; begin += steps) {
    const int64_t now = std::min(steps, length - begin);
    const auto for_rows = [&](const auto& f) {
      for (int64_t b = 0; b < batch; b++)
        for (int64_t t = 0; t < now; t++) f((b * length + begin + t) * units, signal + t * row + b * units);
    };
    for_rows([&](int64_t at, float* to) { std::copy(x + at, x + at + units, to); });
    for (int64_t i = 0; i < count; i++) {
      const auto product = [&](const void* weights) {
        return Product<W>{static_cast<const W*>(weights), units, groups * kGroup};
      };
      const Product<W> input = product(layers[i].input), recurrent = product(layers[i].recurrent);
      LstmState& state = *states[i];
      sliding_product(now * batch, {signal, units, units, 0}, input, {gates, input.N, false, false}, pool);
      for (int64_t t = 0; t < now; t++) {
        const float* h = state.h + (begin + t) % 2 * row;
        float* next = state.h + (begin + t + 1) % 2 * row;
        parallel(pool, groups, [&](int64_t first, int64_t last) {
          Buffer<float> mine(batch * kGroup);
          for (int64_t task = first; task < last; task++) {
            // Back and forth, so that a step begins with the weights that the one before read last.
            const int64_t g = t % 2 ? first + last - 1 - task : task;
            const float* from = gates + t * batch * input.N + g * kGroup;
            for (int64_t b = 0; b < batch; b++)
              std::copy(from + b * input.N, from + b * input.N + kGroup, mine + b * kGroup);
            const Product<W> group{recurrent.data + g * kGates * recurrent.panel(), units, kGroup};
            sliding_panels(batch, {h, units, units, 0}, group, 0, kGates, {mine, kGroup, true, false});
            lstm_units(batch, mine, state.c + g * kColumns, padded, std::min(kColumns, units - g * kColumns),
                       next + g * kColumns, units);
          }
        });
        std::copy(next, next + row, signal + t * row);
      }
    }
    for_rows([&](int64_t at, const float* h) {
      for (int64_t u = 0; u < units; u++) out[at + u] = h[u] + (skip ? x[at + u] : 0.0f);
    });
  }
  for (int64_t i = 0; i < count; i++) states[i]->save(length, batch, units, padded, after + 2 * i * row);
}

inline void lstm(const LstmLayer* layers, int64_t count, Element weights, const float* x, int64_t batch, int64_t length,
                 int64_t units, bool skip, const float* before, float* out, float* after, const ThreadPool& pool) {
  const auto run = weights == Element::bfloat16 ? lstm_of<BFloat16> : lstm_of<float>;
  run(layers, count, x, batch, length, units, skip, before, out, after, pool);
}

}  // namespace AAR_ISA
}  // namespace aar
