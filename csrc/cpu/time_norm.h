// Normalisation over channels and time: GroupNorm with one group.
#pragma once
#include <algorithm>
#include <cmath>

#include "aar/seanet.h"
#include "simd.h"

namespace aar {
namespace AAR_ISA {

constexpr int64_t kNormFloats = 4096;  // taken at a time: the second look at them finds them in the first-level cache

struct Moments {
  double count = 0, mean = 0, squares = 0;  // squares: of the distances from the mean

  // Of both parts together (Chan, Golub and LeVeque).
  void add(const Moments& other) {
    const double total = count + other.count, apart = other.mean - mean;
    mean += apart * other.count / total;
    squares += other.squares + apart * apart * count * other.count / total;
    count = total;
  }
};

// The sum of f(x) over n floats.
template <class F>
inline float sum_of(const float* x, int64_t n, const F& f) {
  Floats sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; j++) sums[j] += f(load(x + i + j * kLanes));
  float sum = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; i++) sum += f(splat(x[i]))[0];
  return sum;
}

inline Moments moments(const float* x, int64_t n) {
  // The mean need not be exact: what it is off by is taken from the squares again.
  const Floats mean = splat(sum_of(x, n, [](Floats v) { return v; }) / float(n));
  const double off = sum_of(x, n, [&](Floats v) { return v - mean; }) / double(n);
  const double squares = sum_of(x, n, [&](Floats v) { return (v - mean) * (v - mean); });
  return {double(n), mean[0] + off, squares - off * off * double(n)};
}

// Every channel's scale and shift, repeated until the pattern is whole vectors.
class Affine {
 public:
  Affine(const float* scale, const float* shift, int64_t channels)
      : period_(channels % kLanes == 0 ? channels : channels * kLanes), scale_(period_), shift_(period_) {
    for (int64_t i = 0; i < period_; i++) scale_[i] = scale[i % channels], shift_[i] = shift[i % channels];
  }

  // x = (x - mean) / deviation * scale + shift, plus `add` unless it is null, over whole steps.
  void apply(const Moments& of, float eps, float* x, const float* add, int64_t n) const {
    const float mean = float(of.mean), inverse = float(1 / std::sqrt(of.squares / of.count + eps));
    for (int64_t begin = 0; begin < n; begin += period_) {
      const int64_t count = std::min(period_, n - begin), whole = count / kLanes * kLanes;
      float* to = x + begin;
      const float* plus = add == nullptr ? nullptr : add + begin;
      for (int64_t i = 0; i < whole; i += kLanes) {
        const Floats shift = plus == nullptr ? load(shift_ + i) : load(shift_ + i) + load(plus + i);
        store(to + i, fma((load(to + i) - splat(mean)) * splat(inverse), load(scale_ + i), shift));
      }
      for (int64_t i = whole; i < count; i++)
        to[i] = std::fma((to[i] - mean) * inverse, scale_[i], plus == nullptr ? shift_[i] : shift_[i] + plus[i]);
    }
  }

 private:
  int64_t period_;
  Buffer<float> scale_, shift_;
};

inline void time_norm(float* x, int64_t batch, int64_t length, int64_t channels, const float* scale, const float* shift,
                      float eps, const float* add, const ThreadPool& pool) {
  // The chunks, and so the order of sums, do not depend on the number of threads.
  const int64_t steps = std::max<int64_t>(1, kNormFloats / channels), chunks = (length + steps - 1) / steps;
  const auto floats_of = [&](int64_t chunk) { return std::min(steps, length - chunk * steps) * channels; };
  const auto start_of = [&](int64_t task) { return (task / chunks * length + task % chunks * steps) * channels; };
  Buffer<Moments> parts(batch * chunks), items(batch);
  parallel(pool, batch * chunks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++)
      parts[task] = moments(x + start_of(task), floats_of(task % chunks));
  });
  for (int64_t item = 0; item < batch; item++) {
    items[item] = Moments{};
    for (int64_t chunk = 0; chunk < chunks; chunk++) items[item].add(parts[item * chunks + chunk]);
  }
  const Affine affine(scale, shift, channels);
  parallel(pool, batch * chunks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t start = start_of(task);
      affine.apply(items[task / chunks], eps, x + start, add == nullptr ? nullptr : add + start,
                   floats_of(task % chunks));
    }
  });
}

}  // namespace AAR_ISA
}  // namespace aar
