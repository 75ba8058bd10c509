// One token at a time, all in the L1 cache: the guided logits, the k-th largest of them, the weights of those that are
// left, the least weight of the top-p set, the draw.
//
// Nothing is sorted. Both filters keep the values at or above a threshold that a bisection finds: over the patterns of
// floats, which are ordered as the floats are, so that it halves the logarithm of an interval at each pass.
#pragma once
#include <atomic>
#include <cmath>
#include <limits>

#include "aar/sampling.h"
#include "simd.h"

namespace aar {
namespace AAR_ISA {

constexpr int kBits = 30;  // the most probable code weighs 2^30
constexpr float kLowest = -32.0f, kRound = 12582912.0f;
constexpr int32_t kRoundBits = 0x4B400000;
constexpr float kExp2[] = {0.6931470036506653f, 0.24022242426872253f, 0.05550733581185341f, 0.009671512991189957f,
                           0.001326472731307149f};
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kGroup = 8;  // vectors whose weights are added up before the draw looks at the sum

// Patterns of floats as integers in the order of the floats, and back: the same operation.
inline int32_t flip_negative(int32_t bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }
inline int32_t key_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return flip_negative(bits);
}
inline float value_of(int32_t key) {
  const int32_t bits = flip_negative(key);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// x[size rounded up to whole groups] is the guided row, -inf behind its end. Returns the largest value, or NaN where
// the row cannot be sampled.
__attribute__((noinline)) inline float guide(const Sampling& settings, const float* logits, const float* uncond,
                                             int64_t size, int64_t padded, float* x) {
  const Floats conditional = splat(settings.conditional), unconditional = splat(settings.unconditional);
  Floats largest = splat(-kInfinity);
  Ints valid = Ints{} - 1;
  for (int64_t i = 0; i < padded; i += kLanes) {
    const int64_t left = size - i;
    Floats value = left >= kLanes ? load(logits + i) : load_part(logits + i, left, -kInfinity);
    if (uncond != nullptr) {
      const Floats other = left >= kLanes ? load(uncond + i) : load_part(uncond + i, left);
      value = value == splat(-kInfinity) ? value : value * conditional - other * unconditional;
    }
    valid &= value < splat(kInfinity);
    largest = max(value, largest);
    store(x + i, value);
  }
  const float best = max_lane(largest);
  bool sound = best > -kInfinity;
  for (int lane = 0; lane < kLanes; lane++) sound &= valid[lane] != 0;
  return sound ? best : std::numeric_limits<float>::quiet_NaN();
}

// The largest threshold for which `measure(threshold)`, a sum over the values at or above it, is at least `needed`, or
// another one that keeps the same values. It lies between lo, where the sum is `of_lo`, and hi, where it is 0 (both are
// keys). `least(threshold)` is what one value at it adds to the sum.
template <class Measure, class Least>
inline float bisect(float from, float beyond, int64_t of_lo, int64_t needed, const Measure& measure,
                    const Least& least, int64_t* kept) {
  int64_t lo = key_of(from), hi = key_of(beyond), of_hi = 0;
  // Where the sums differ by less than two values, no threshold between tells more apart.
  while (of_lo > needed && hi - lo > 1 && of_lo - of_hi >= 2 * least(value_of(int32_t(lo)))) {
    const int64_t middle = lo + (hi - lo) / 2, sum = measure(value_of(int32_t(middle)));
    if (sum >= needed) {
      lo = middle;
      of_lo = sum;
    } else {
      hi = middle;
      of_hi = sum;
    }
  }
  *kept = of_lo;
  return value_of(int32_t(lo));
}

__attribute__((noinline)) inline int64_t count_from(float threshold, const float* x, int64_t padded) {
  const Floats least = splat(threshold);
  Ints count = {};
  for (int64_t i = 0; i < padded; i += kLanes) count -= load(x + i) >= least;
  int64_t sum = 0;
  for (int lane = 0; lane < kLanes; lane++) sum += count[lane];
  return sum;
}

inline Ints weight(Floats t) {
  t = t > splat(kLowest) ? t : splat(kLowest);
  const Floats shifted = t + splat(kRound), f = t - (shifted - splat(kRound));
  Floats power = f * splat(kExp2[4]);
  for (int i = 3; i >= 0; i--) power = (power + splat(kExp2[i])) * f;
  power = power + splat(1.0f);
  const Ints exponent = (Ints)shifted - (kRoundBits - kBits);
  return __builtin_convertvector((Floats)((Ints)power + (exponent << 23)), Ints);
}

// Replaces x by its weights and returns their sum.
__attribute__((noinline)) inline int64_t weigh(float* x, int64_t padded, float largest, float scale) {
  Longs total = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Ints w = weight((load(x + i) - splat(largest)) * splat(scale));
    total += add_halves(w);
    store(x + i, (Floats)w);
  }
  return sum_lanes(total);
}

inline Ints kept_weights(const float* weights, int32_t threshold) {
  const Ints w = load_ints(weights);
  return w & (w >= threshold);
}
__attribute__((noinline)) inline int64_t sum_from(int32_t threshold, const float* weights, int64_t padded) {
  Longs total = {};
  for (int64_t i = 0; i < padded; i += kLanes) total += add_halves(kept_weights(weights + i, threshold));
  return sum_lanes(total);
}

// The first place at which the running sum of the weights at or above the threshold exceeds `target`.
__attribute__((noinline)) inline int64_t pick(const float* weights, int32_t threshold, int64_t target) {
  int64_t place = 0;
  for (;; place += kGroup * kLanes) {
    Longs total = {};
    for (int i = 0; i < kGroup; i++) total += add_halves(kept_weights(weights + place + i * kLanes, threshold));
    const int64_t sum = sum_lanes(total);
    if (sum > target) break;
    target -= sum;
  }
  for (;; place++) {
    int32_t w;
    std::memcpy(&w, weights + place, sizeof w);
    if (w >= threshold) target -= w;
    if (target < 0) return place;
  }
}

// 53 bits of Philox4x32-10 (Salmon et al. 2011) as a number in [0, 1).
inline double uniform(uint64_t seed, uint64_t token) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  uint32_t c0 = uint32_t(token), c1 = uint32_t(token >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; round++) {
    const uint64_t left = uint64_t(0xD2511F53) * c0, right = uint64_t(0xCD9E8D57) * c2;
    c0 = uint32_t(right >> 32) ^ c1 ^ k0;
    c1 = uint32_t(right);
    c2 = uint32_t(left >> 32) ^ c3 ^ k1;
    c3 = uint32_t(left);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return double((uint64_t(c0) << 32 | c1) >> 11) * 0x1p-53;
}

// Scratch of one thread.
struct Row {
  explicit Row(int64_t vocabulary)
      : padded((vocabulary + kGroup * kLanes - 1) / (kGroup * kLanes) * (kGroup * kLanes)),
        x(padded), kept(padded + kLanes), code(padded + kLanes) {}
  int64_t padded;
  Buffer<float> x, kept;
  Buffer<int32_t> code;
};

// Moves the values at or above the threshold, and their codes, to row.kept and row.code; returns their padded number.
__attribute__((noinline)) inline int64_t gather(float threshold, Row& row) {
  Ints codes;
  for (int lane = 0; lane < kLanes; lane++) codes[lane] = lane;
  int64_t n = 0;
  for (int64_t i = 0; i < row.padded; i += kLanes, codes += kLanes) {
    const Floats value = load(row.x + i);
    const uint32_t bits = mask_ge(value, splat(threshold));
    compress(row.kept + n, bits, (Ints)value);
    compress(row.code + n, bits, codes);
    n += __builtin_popcount(bits);
  }
  const int64_t group = kGroup * kLanes, padded = (n + group - 1) / group * group;
  for (; n < padded; n++) row.kept[n] = -kInfinity;
  return padded;
}

inline int64_t sample_row(const Sampling& settings, const float* logits, const float* uncond, int64_t vocabulary,
                          uint64_t seed, uint64_t token, Row& row) {
  const float largest = guide(settings, logits, uncond, vocabulary, row.padded, row.x);
  if (std::isnan(largest)) return -1;
  if (settings.scale == 0.0f) {
    int64_t code = 0;
    while (row.x[code] != largest) code++;
    return code;
  }
  float* weights = row.x;
  int64_t padded = row.padded, total;
  const bool filtered = settings.top_k > 0 && settings.top_k < vocabulary;
  if (filtered) {
    const auto count = [&](float least) { return count_from(least, row.x, row.padded); };
    const float beyond = value_of(key_of(largest) + 1);
    const float kth = bisect(-kInfinity, beyond, padded, settings.top_k, count, [](float) { return 1; }, &total);
    padded = gather(kth, row);
    weights = row.kept;
  }
  total = weigh(weights, padded, largest, settings.scale);
  int32_t threshold = 1;
  if (settings.top_p < 1.0) {
    const int64_t needed = int64_t(std::ceil(double(total) * settings.top_p));
    const auto sum = [&](float least) { return sum_from(int32_t(least), weights, padded); };
    const auto least = [](float weight) { return int64_t(weight); };
    threshold = int32_t(bisect(1.0f, 2.0f * (1 << kBits), total, needed, sum, least, &total));
  }
  const int64_t place = pick(weights, threshold, int64_t(uniform(seed, token) * double(total)));
  return filtered ? row.code[place] : place;
}

inline bool sample(const Sampling& settings, const float* logits, const float* uncond, const int64_t* seeds,
                   int64_t batch, int64_t tokens, int64_t vocabulary, int64_t* codes, const ThreadPool& pool) {
  std::atomic<bool> sound = true;
  parallel(pool, batch * tokens, [&](int64_t begin, int64_t end) {
    Row row(vocabulary);
    for (int64_t i = begin; i < end; i++) {
      codes[i] = sample_row(settings, logits + i * vocabulary, uncond == nullptr ? nullptr : uncond + i * vocabulary,
                            vocabulary, uint64_t(seeds[i / tokens]), uint64_t(settings.position + i % tokens), row);
      if (codes[i] < 0) sound = false;
    }
  });
  return sound;
}

}  // namespace AAR_ISA
}  // namespace aar

// Where a level's file instantiates the table of kernels.
#define AAR_DEFINE_SAMPLING(LEVEL) const aar::SamplingKernels aar::sampling_kernels_##LEVEL = {AAR_ISA::sample};
