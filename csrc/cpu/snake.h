// Snake, x + sin(alpha x)^2 / (alpha + 1e-9), on vectors.
#pragma once
#include <initializer_list>
#include <vector>

#include "storage.h"

namespace aar {
namespace AAR_ISA {

// The sine is squared, so its argument t is reduced by multiples of pi, which Cody and Waite's three parts subtract
// without loss, to r within pi / 2, and its sign is nobody's concern. An odd polynomial of r (error 6e-9) has no
// cancellation near zero, as (1 - cos 2t) / 2 has. From 2^23 on the term is less than a unit in the last place of x,
// and is left out; infinity gives NaN, as sin does.
inline Floats snake(Floats x, Floats alpha, Floats inverse) {
  const Floats t = alpha * x;
  const Floats magic = splat(12582912.0f), n = fma(t, splat(0.318309886f), magic) - magic;  // 1.5 * 2^23 rounds
  Floats r = fma(n, splat(-3.140625f), t);
  r = fma(n, splat(-9.67502593994140625e-4f), r);
  r = fma(n, splat(-1.50995798e-7f), r);
  const Floats square = r * r;
  Floats p = splat(2.6057207e-6f);
  for (float c : {-1.9809577e-4f, 8.3330655e-3f, -1.6666660e-1f}) p = fma(p, square, splat(c));
  const Floats sine = fma(p * square, r, r), limit = splat(8388608.0f);
  const Floats term = t < limit && t > -limit ? sine * sine : t * splat(0.0f);
  return fma(term, inverse, x);
}

// Of signals [time][channels].
class Snake {
 public:
  template <class W>
  Snake(const W* alpha, int64_t channels)
      : channels_(channels), alpha_(channels + kLanes - 1), inverse_(channels + kLanes - 1) {
    for (int64_t c = 0; c < channels; c++) alpha_[c] = widen(alpha[c]), inverse_[c] = 1 / (alpha_[c] + 1e-9f);
  }

  // `steps` rows of x, `row` apart, to rows of out; both may be the same.
  void apply(const float* x, int64_t row, int64_t steps, float* out, int64_t out_row) const {
    const int64_t whole = channels_ / kLanes * kLanes;
    for (int64_t t = 0; t < steps; t++, x += row, out += out_row) {
      for (int64_t c = 0; c < whole; c += kLanes) store(out + c, at(c, load(x + c)));
      if (whole == channels_) continue;
      float lanes[kLanes];
      store(lanes, at(whole, load_part(x + whole, channels_ - whole)));
      std::memcpy(out + whole, lanes, (channels_ - whole) * sizeof(float));
    }
  }

 private:
  Floats at(int64_t c, Floats x) const { return snake(x, load(&alpha_[c]), load(&inverse_[c])); }

  int64_t channels_;
  std::vector<float> alpha_, inverse_;
};

}  // namespace AAR_ISA
}  // namespace aar
