// The residuals of some items, and which of their frames are real.
#pragma once
#include "aar/msrq.h"
#include "simd.h"

namespace aar {
namespace AAR_ISA {

inline int64_t total_tokens(const Shape& shape) {
  int64_t total = 0;
  for (int64_t s = 0; s < shape.scales; s++) total += shape.lengths[s];
  return total;
}

inline int64_t longest(const Shape& shape) {
  int64_t n = 0;
  for (int64_t s = 0; s < shape.scales; s++) n = shape.lengths[s] > n ? shape.lengths[s] : n;
  return n;
}

inline bool all_finite(const float* x, int64_t n) {
  // x - x is 0 for a finite x and NaN otherwise; NaN survives every addition.
  Floats sum = splat(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load(x + i) - load(x + i);
  float rest = sum_lanes(sum);
  for (; i < n; i++) rest += x[i] - x[i];
  return rest == 0.0f;
}

class Items {
 public:
  // residual[items][length][channels] is the caller's.
  Items(float* residual, int64_t items, int64_t length, int64_t channels, bool masked)
      : residual_(residual), length_(length), channels_(channels), size_(length * channels), masked_(masked),
        masks_(items), seen_(masked ? items * (length + 1) : 0), broken_(items) {}

  // Item b begins as x[length][channels], of which mask[length] tells the real frames.
  void start(int64_t b, const float* x, const uint8_t* mask) {
    std::memcpy(residual(b), x, sizeof(float) * size_);
    masks_[b] = mask;
    clear_masked(b);
    if (masked_) {
      int32_t* seen = seen_ + b * (length_ + 1);
      seen[0] = 0;
      for (int64_t t = 0; t < length_; t++) seen[t + 1] = seen[t] + (mask[t] != 0);
    }
    broken_[b] = !all_finite(residual(b), size_);
  }

  float* residual(int64_t b) const { return residual_ + b * size_; }

  // The number of real frames before each of an item's, or null where all are real.
  const int32_t* seen(int64_t b) const { return masked_ ? seen_ + b * (length_ + 1) : nullptr; }

  void clear_masked(int64_t b) const {
    for (int64_t t = 0; masked_ && t < length_; t++)
      if (!masks_[b][t]) std::memset(residual(b) + t * channels_, 0, sizeof(float) * channels_);
  }

  // No code, -1, for tokens of n without a real frame, and for all of an item that has a NaN or an Inf in it.
  void drop_unseen(int64_t b, int64_t n, int64_t* idx) const {
    if (!broken_[b] && !masked_) return;
    const int32_t* seen = this->seen(b);
    for (int64_t i = 0; i < n; i++) {
      const int64_t begin = i * length_ / n, end = ((i + 1) * length_ + n - 1) / n;
      if (broken_[b] || seen[end] == seen[begin]) idx[i] = -1;
    }
  }

 private:
  float* residual_;
  const int64_t length_, channels_, size_;
  const bool masked_;
  Buffer<const uint8_t*> masks_;
  Buffer<int32_t> seen_;
  Buffer<bool> broken_;
};

}  // namespace AAR_ISA
}  // namespace aar
