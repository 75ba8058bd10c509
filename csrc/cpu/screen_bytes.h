// Scores of all codes from roundings to 8 bits, for half the price of `screen`.
//
// A codebook shares one unit, so that scores are integers of 16 bits, in one unit per row. Without AVX-512 VNNI
// products are added up in 16 bits too: units are chosen so that by Cauchy-Schwarz no sum over a chunk of channels can
// exceed them. The codes are unsigned, offset by 128; that times the sum of the row is where its sums start from.
#pragma once
#include "halves.h"
#include "screen_shorts.h"

namespace aar {
namespace AAR_ISA {

constexpr int kOffset = 128;
constexpr float kCodeRange = 127.0f;
#if defined(__AVX512VNNI__)
constexpr float kRowRange = 127.0f;
constexpr int kSumVectors = 2, kScoreVectors = 1;  // of a row in a register tile
#else
constexpr float kRowRange = 64.0f;  // 2 * 255 * 64 < 2^15
constexpr int kSumVectors = kBlock / kHalfLanes < 2 ? 1 : 2, kScoreVectors = kSumVectors;
#endif
constexpr int64_t kStepCodes = kScoreVectors * kHalfLanes;

// How the channels are divided.
struct ByteSplit {
  int64_t groups, chunks, chunk;  // in all, and groups in a chunk, which is added up before the sum is shifted
  int shift;                      // so that all chunks fit 16 bits together
  float most, most_code;          // that a chunk's sum may be, and the norm of a code in it
};

inline ByteSplit byte_split(int64_t dim) {
  ByteSplit split;
  split.groups = byte_width(dim) / kGroup;
  if (kGroup == 4) {  // sums of 32 bits
    split.chunks = 1;
    split.shift = 0;
    while ((dim + 7) / 8 >> split.shift > 1) split.shift++;
    split.most = 32767.0f * float(1 << split.shift);
    split.most_code = std::sqrt(split.most);
  } else {
    // Smaller chunks allow finer units and cost more; more channels make more candidates, which finer units avoid.
    const int64_t channels = dim <= 128 ? 64 : 32;
    split.chunks = (dim + channels - 1) / channels;
    split.shift = 0;
    while (1 << split.shift < split.chunks) split.shift++;
    split.most = 32767.0f;
    split.most_code = channels == 64 ? 181.0f : 235.0f;  // rows get the rest, which at 32 channels is all they can use
  }
  split.chunk = (split.groups + split.chunks - 1) / split.chunks;
  return split;
}

// The largest magnitude in row[dim], and the largest norm of its chunks of `wide` channels.
struct Extent {
  float largest, norm;
};
inline Extent extent(const float* row, int64_t dim, int64_t wide) {
  Floats most = splat(0.0f);
  float square = 0.0f;
  for (int64_t begin = 0; begin < dim; begin += wide) {
    const int64_t end = dim - begin < wide ? dim : begin + wide;
    Floats sum = splat(0.0f);
    for (int64_t d = begin; d < end; d += kLanes) {
      const Floats x = load_up_to(row + d, end - d);
      most = max(most, max(x, -x));
      sum = fma(x, x, sum);
    }
    square = std::fmax(square, tree_sum(sum));
  }
  return {max_lane(most), std::sqrt(square)};
}

// Pairs of bytes, each from the low halves of a lane's two integers of 16 bits.
inline Ints byte_pairs(const int16_t* rounded) {
  const Ints two = load_ints(rounded);
  return (two & 0xFF) | ((two >> 8) & 0xFF00);
}

// What rows need to know of a codebook in bytes.
enum Bound { kUnit = 3, kNorm, kError, kBiasUnit, kLeastUnit, kPerNorm };

// Packs codes e[codes][dim]. Leaves bound[kUnit] at 0 where the codebook is not finite, or beyond what bytes can tell.
inline void pack_bytes(const float* e, const Shape& shape, const float* bias, uint8_t* bytes, int16_t* byte_bias,
                       float* bound) {
  const int64_t dim = shape.dim, width = byte_width(dim), size = padded(shape.codes);
  const ByteSplit split = byte_split(dim);
  const int64_t wide = split.chunk * kGroup;
  Extent most{0.0f, 0.0f};
  float norm = 0.0f, largest_bias = 0.0f, finite = 0.0f;
  for (int64_t k = 0; k < shape.codes; k++) {
    const Extent whole = extent(e + k * dim, dim, dim), own = extent(e + k * dim, dim, wide);
    most.largest = std::fmax(most.largest, own.largest);
    most.norm = std::fmax(most.norm, own.norm);
    norm = std::fmax(norm, whole.norm);
    largest_bias = std::fmax(largest_bias, bias[k]);
    finite += whole.norm - whole.norm;  // NaN if anything is not finite
  }
  bound[kUnit] = 0.0f;
  if (!(finite == 0.0f) || norm > 1e15f || norm < 1e-15f) return;
  const float unit = std::fmax(most.largest / kCodeRange, most.norm / split.most_code);
  const float bias_unit = largest_bias / 32767.0f;
  Buffer<int16_t> rounded(width + 2 * kLanes);
  float error = 0.0f, integers = 0.0f;
  for (int64_t k = 0; k < size; k++) {
    // Padding repeats the last code, so that it changes no maximum.
    const int64_t code = k < shape.codes ? k : shape.codes - 1;
    byte_bias[k] = bias_unit > 0.0f ? int16_t(std::fmin(std::nearbyint(bias[code] / bias_unit), 32767.0f)) : int16_t(0);
    float error2 = 0.0f;
    for (int64_t d = 0; d < dim; d += wide) {
      const Rounded norms = round_by(unit, e + code * dim + d, dim - d < wide ? dim - d : wide, rounded + d);
      error2 += norms.error * norms.error;
      integers = std::fmax(integers, norms.norm / unit);
    }
    error = std::fmax(error, std::sqrt(error2));
    for (int64_t d = 0; d < width; d += 2 * kLanes) store_shorts(rounded + d / 2, byte_pairs(rounded + d) ^ 0x8080);
    int64_t at = k % kBlock;
    // Two vectors of sums are packed into one, the lower halves of every 128 bits from the first.
    if (kGroup == 4) at = at % 8 / 4 * 16 + at / 8 * 4 + at % 4;
    uint8_t* out = bytes + k / kBlock * kBlock * width + at * kGroup;
    const auto* groups = reinterpret_cast<const uint8_t*>(rounded.get());
    for (int64_t g = 0; g < split.groups; g++) std::memcpy(out + g * kBlock * kGroup, groups + g * kGroup, kGroup);
  }
  integers *= 1.001f;
  bound[kUnit] = unit;
  bound[kNorm] = norm * 1.0001f;
  bound[kError] = error;
  bound[kBiasUnit] = bias_unit;
  bound[kLeastUnit] = largest_bias / (32000.0f * unit * float(1 << split.shift));
  // A row's integers are off by up to a half each, which counts for its norm in a chunk, too.
  bound[kPerNorm] = 1.001f * integers / (split.most - 0.5f * std::sqrt(float(wide < dim ? wide : dim)) * integers);
}

// Rounded rows of a tile: groups[row][group], each repeated to 32 bits; what sums start from, starts[row][chunk]; the
// value of bias in a row's unit; twice the largest error of its scores; and what its norm is at most.
struct ByteRows {
  int32_t *groups, *starts;
  int16_t bias_factor[kSearchRows];
  int32_t tolerance[kSearchRows];
  float norm[kSearchRows];
};

// The least unit in which neither a row's channels nor the scores exceed their integers.
inline float byte_unit(const float* z, int64_t dim, const ByteSplit& split, const Book& book) {
  const float* bound = book.bound;
  const Extent most = extent(z, dim, split.chunk * kGroup);
  const float unit = std::fmax(most.largest / kRowRange, most.norm * bound[kPerNorm]);
  return std::fmax(std::fmax(unit, bound[kLeastUnit]), std::numeric_limits<float>::min());
}

// Rounds row r of a tile. Returns false where bytes cannot say anything about it.
inline bool round_bytes(float unit, const float* z, int64_t dim, const ByteSplit& split, const Book& book,
                        int16_t* rounded, ByteRows& rows, int64_t r) {
  const float* bound = book.bound;
  const Rounded norms = round_by(unit, z, dim, rounded);
  const double score_unit = double(unit) * bound[kUnit] * double(int64_t(1) << split.shift);
  const double inexact = double(norms.error) * bound[kNorm] + double(norms.norm) * bound[kError];
  const double tolerance = 2.001 * inexact / score_unit + double(split.chunks) + 4.0;
  if (!(tolerance < 32767.0)) return false;
  rows.tolerance[r] = int32_t(tolerance);
  rows.norm[r] = norms.norm + norms.error;
  rows.bias_factor[r] = int16_t(std::nearbyint(32768.0 * bound[kBiasUnit] / score_unit));
  const int64_t width = split.groups * kGroup, wide = split.chunk * kGroup;
  for (int64_t c = 0; c < split.chunks; c++) {
    int32_t sum = 0;
    for (int64_t d = c * wide; d < (c + 1) * wide && d < width; d++) sum += rounded[d];
    const uint32_t start = uint32_t(-kOffset * sum);
    rows.starts[r * split.chunks + c] = int32_t(kGroup == 4 ? start : (start & 0xFFFF) | start << 16);
  }
  int32_t* groups = rows.groups + r * split.groups;
  for (int64_t g = 0; g < split.groups; g += kLanes * 2 / kGroup) {
    const Ints bytes = byte_pairs(rounded + g * kGroup);
    if (kGroup == 4) store_shorts(groups + g, bytes);
    else store_ints(groups + g, bytes | bytes << 16);
  }
  return true;
}

inline void to_scores(const ByteSums (&sum)[kSumVectors], int shift, Halves (&score)[kScoreVectors]) {
#if defined(__AVX512VNNI__)
  score[0] = (Halves)_mm512_packs_epi32((__m512i)(sum[0] >> shift), (__m512i)(sum[1] >> shift));
#else
  for (int v = 0; v < kScoreVectors; v++) score[v] = sum[v] >> shift;
#endif
}

// Scores z.e - bias in 16 bits: larger is nearer. best[r] is the largest.
// Not inlined, as `screen`; small loops, so that the compiler keeps sums in registers at their ends.
template <int ROWS>
__attribute__((noinline)) void screen_bytes(const ByteRows& rows, const ByteSplit& split, const Book& book, bool cosine,
                                            int64_t size, int16_t* scores, int16_t* best) {
  const int64_t groups = split.groups;
  const int32_t* z = rows.groups;
  Halves top[ROWS];
  for (int r = 0; r < ROWS; r++) top[r] = splat_half(-32768);
  for (int64_t first = 0; first < size; first += kStepCodes) {
    const uint8_t* codes = book.bytes + first / kBlock * kBlock * groups * kGroup + first % kBlock * kGroup;
    int16_t* out = scores + first;
    for (int64_t c = 0, begin = 0; c < split.chunks; c++, begin += split.chunk) {
      const int64_t end = begin + split.chunk < groups ? begin + split.chunk : groups;
      ByteSums sum[ROWS][kSumVectors];
      for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < kSumVectors; v++) sum[r][v] = (ByteSums)(rows.starts[r * split.chunks + c] - Ints{});
      for (int64_t g = begin; g < end; g++) {
        Ints e[kSumVectors];
        for (int v = 0; v < kSumVectors; v++) e[v] = load_ints(codes + g * kBlock * kGroup + v * 4 * kLanes);
        for (int r = 0; r < ROWS; r++) {
          const Ints x = z[r * groups + g] - Ints{};
          for (int v = 0; v < kSumVectors; v++) sum[r][v] = dot_bytes(sum[r][v], e[v], x);
        }
      }
      Halves score[ROWS][kScoreVectors];
      for (int r = 0; r < ROWS; r++) to_scores(sum[r], split.shift, score[r]);
      if (c > 0)
        for (int r = 0; r < ROWS; r++)
          for (int v = 0; v < kScoreVectors; v++) score[r][v] += load_halves(out + r * size + v * kHalfLanes);
      if (c + 1 == split.chunks) {
        if (!cosine)
          for (int v = 0; v < kScoreVectors; v++) {
            const Halves bias = load_halves(book.byte_bias + first + v * kHalfLanes);
            for (int r = 0; r < ROWS; r++) {
              const Halves own = multiply_fraction(bias, splat_half(rows.bias_factor[r]));
              score[r][v] = subtract_saturated(score[r][v], own);
            }
          }
        for (int r = 0; r < ROWS; r++)
          for (int v = 0; v < kScoreVectors; v++) top[r] = max(top[r], score[r][v]);
      }
      for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < kScoreVectors; v++) store(out + r * size + v * kHalfLanes, score[r][v]);
    }
  }
  for (int r = 0; r < ROWS; r++) best[r] = max_lane(top[r]);
}

}  // namespace AAR_ISA
}  // namespace aar
