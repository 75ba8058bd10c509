// Nearest code of each row, exactly: screen with integers, then compare what they cannot tell apart, in fp32 first and
// in the end in double.
//
// Rows and codes are rounded to 8 bits (`screen_bytes`), or to 16 (`screen`) where bytes leave too many codes: rows or
// codebooks with outliers. Candidates are codes whose screened score is within twice its largest error of the best:
// with 64 channels and 1024 random codes some six of a row in 8 bits, one in 16.
#pragma once
#include "screen_bytes.h"
#include "screen_shorts.h"

namespace aar {
namespace AAR_ISA {

inline Book book(const Shape& shape, const Packed& packed, const float* codebooks, int64_t s) {
  const int64_t b = shape.books > 1 ? s : 0, size = padded(shape.codes);
  return {packed.codes + b * size * 2 * pairs(shape.dim), packed.scale + b * size, packed.bias + b * size,
          (shape.cosine ? packed.exact : codebooks) + b * shape.codes * shape.dim, packed.bound + b * kBounds,
          packed.bytes == nullptr ? nullptr : packed.bytes + b * size * byte_width(shape.dim),
          packed.bytes == nullptr ? nullptr : packed.byte_bias + b * size};
}

// Several chains of additions, which overlap.
inline double exact_square(const float* row, int64_t dim) {
  double sums[8] = {}, total = 0.0;
  int64_t d = 0;
  for (; d + 8 <= dim; d += 8)
    for (int i = 0; i < 8; i++) sums[i] += double(row[d + i]) * double(row[d + i]);
  for (; d < dim; d++) total += double(row[d]) * double(row[d]);
  for (double sum : sums) total += sum;
  return total;
}

// bias[codes]: |e|^2 / 2, or 0 for cosine. Returns the codes as they are searched: for cosine normalised[codes][dim].
inline const float* measure_book(const float* codebook, const Shape& shape, float* bias, float* normalised) {
  const int64_t dim = shape.dim;
  for (int64_t k = 0; k < shape.codes; k++) {
    const float* e = codebook + k * dim;
    const double square = exact_square(e, dim);
    const double norm = std::fmax(std::sqrt(square), 1e-12);
    for (int64_t d = 0; shape.cosine && d < dim; d++) normalised[k * dim + d] = float(double(e[d]) / norm);
    bias[k] = shape.cosine ? 0.0f : float(0.5 * square);
  }
  return shape.cosine ? normalised : codebook;
}

inline void pack_book(const float* codebook, const Shape& shape, const Packed& packed, int64_t b) {
  const int64_t dim = shape.dim, size = padded(shape.codes);
  float *bias = packed.bias + b * size, *bound = packed.bound + b * kBounds;
  const float* codes =
      measure_book(codebook, shape, bias, shape.cosine ? packed.exact + b * shape.codes * dim : nullptr);
  pack_shorts(codes, shape, packed.codes + b * size * 2 * pairs(dim), packed.scale + b * size, bias, bound);
  if (packed.bytes != nullptr)
    pack_bytes(codes, shape, bias, packed.bytes + b * size * byte_width(dim), packed.byte_bias + b * size, bound);
}

// Bit i is set where p[i] >= threshold, for 32 of them.
inline uint32_t mask_ge_32(const float* p, Floats threshold) {
  uint32_t bits = 0;
  for (int v = 0; v < kBlockVectors; v++) bits |= mask_ge(load(p + v * kLanes), threshold) << (v * kLanes);
  return bits;
}

// Lists the codes whose score is at least the threshold, in their order; returns how many. Writes two numbers behind.
template <class Score, class Vector>
inline int64_t collect(const Score* scores, int64_t codes, Vector threshold, int32_t* found) {
  int64_t count = 0;
  for (int64_t block = 0; block < codes; block += 2 * kBlock) {
    uint64_t bits = mask_ge_32(scores + block, threshold);
    if (codes - block > kBlock) bits |= uint64_t(mask_ge_32(scores + block + kBlock, threshold)) << kBlock;
    if (codes - block < 2 * kBlock) bits &= (uint64_t(1) << (codes - block)) - 1;
    // Up to two are listed without a branch, which would often be mispredicted.
    const int more = __builtin_popcountll(bits);
    for (int i = 0; i < 2; i++, bits &= bits - 1)
      found[count + i] = int32_t(block + __builtin_ctzll(bits | uint64_t(1) << 63));
    for (int i = 2; i < more; i++, bits &= bits - 1) found[count + i] = int32_t(block + __builtin_ctzll(bits));
    count += more;
  }
  return count;
}

// Squared distance to (euclidean) or minus the product with (cosine) one code.
inline double exact_cost(const float* z, const float* e, int64_t dim, bool cosine) {
  double cost = 0.0;
  for (int64_t d = 0; d < dim; d++) {
    const double difference = double(z[d]) - double(e[d]);
    cost += cosine ? -double(z[d]) * double(e[d]) : difference * difference;
  }
  return cost;
}

// The same in fp32.
template <bool cosine>
inline float rounded_cost(const float* z, const float* e, int64_t dim) {
  const auto add = [](Floats sum, Floats x, Floats y) { return cosine ? fma(-x, y, sum) : fma(x - y, x - y, sum); };
  Floats sum = splat(0.0f);
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) sum = add(sum, load(z + d), load(e + d));
  if (d < dim) sum = add(sum, load_part(z + d, dim - d), load_part(e + d, dim - d));
  return tree_sum(sum);
}

// The first of the nearest codes among candidates in their order.
inline int64_t nearest(const int32_t* candidates, int64_t count, const float* z, const Book& book, const Shape& shape) {
  if (count == 0) return 0;  // only a codebook with NaN in it leaves no candidate
  int64_t chosen = candidates[0];
  if (count == 1) return chosen;  // nothing to compare
  double cost = exact_cost(z, book.exact + chosen * shape.dim, shape.dim, shape.cosine);
  for (int64_t i = 1; i < count; i++) {
    const double other = exact_cost(z, book.exact + candidates[i] * shape.dim, shape.dim, shape.cosine);
    if (other < cost) chosen = candidates[i], cost = other;
  }
  return chosen;
}

constexpr int64_t kMostCandidates = 128;

// How many candidates of a row are cheaper to compare than to screen again.
inline int64_t most_candidates(int64_t codes) {
  const int64_t most = codes / 16;
  return most < 8 ? 8 : most < kMostCandidates ? most : kMostCandidates;
}

// Keeps the candidates that fp32 cannot tell from the nearest; returns how many. norm: of z times that of the longest
// code, at least. costs: room for `count`.
inline int64_t refine(int32_t* candidates, int64_t count, const float* z, float norm, const Book& book,
                      const Shape& shape, float* costs) {
  if (count < 2) return count;
  float least = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; i++) {
    const float* e = book.exact + candidates[i] * shape.dim;
    costs[i] = shape.cosine ? rounded_cost<true>(z, e, shape.dim) : rounded_cost<false>(z, e, shape.dim);
    least = costs[i] < least ? costs[i] : least;
  }
  // A sum of products in n roundings is off by n * 2^-24 of the sum of their magnitudes, plus what underflows.
  const float relative = float(shape.dim / kLanes + kLanes + 8) * 0x1p-24f;
  const float magnitude = shape.cosine ? norm : least;
  const float threshold = least + 2.5f * relative * magnitude + std::numeric_limits<float>::min();
  int64_t kept = 0;
  for (int64_t i = 0; i < count; i++) {
    candidates[kept] = candidates[i];
    kept += costs[i] <= threshold;
  }
  return kept;
}

// What each of some workers needs for a tile of rows.
struct SearchScratch {
  int64_t rounded_size, groups_size, scores_size, found_size;
  Buffer<int16_t> rounded;  // rows in 16 bits
  Buffer<int32_t> groups;   // rows in 8 bits
  Buffer<float> scores;     // or scores in 16 bits
  Buffer<int32_t> found;    // candidates
  SearchScratch(const Shape& shape, int64_t workers)
      : rounded_size(kSearchRows * 2 * pairs(shape.dim) + 32),
        groups_size(kSearchRows * (byte_split(shape.dim).groups + byte_split(shape.dim).chunks) + 32),
        scores_size(kSearchRows * padded(shape.codes)),
        found_size(padded(shape.codes) + kSearchRows * kMostCandidates + 2),
        rounded(workers * rounded_size), groups(workers * groups_size), scores(workers * scores_size),
        found(workers * found_size) {}
};

// One worker's view of the scratch and of what it searches.
struct Search {
  const Book& book;
  const Shape& shape;
  const ByteSplit split;
  int16_t* rounded;
  int32_t* groups;
  float* scores;
  int32_t* found;
};

template <int ROWS>
inline void search_shorts(const float* z, const Search& at, int64_t* out) {
  const int64_t dim = at.shape.dim, half = pairs(dim), size = padded(at.shape.codes);
  const float range = integer_range(dim), *bound = at.book.bound;
  float per_unit[ROWS], tolerance[ROWS], norm[ROWS], best[ROWS];
  // In order of rows: the vector stored behind a row's end is overwritten by the next one.
  for (int r = 0; r < ROWS; r++) {
    Rounded norms;
    const float unit = round_row(z + r * dim, dim, range, at.rounded + r * 2 * half, &norms);
    per_unit[r] = 1.0f / unit;
    tolerance[r] = 2.001f * score_error(norms, at.shape, bound) * per_unit[r];
    norm[r] = 1.0001f * (norms.norm + norms.error) * bound[0];
  }
  screen<ROWS>(at.rounded, half, per_unit, at.book, size, at.scores, best);
  for (int r = 0; r < ROWS; r++) {
    float* scores = at.scores + r * size;
    int64_t count = collect(scores, at.shape.codes, splat(best[r] - tolerance[r]), at.found);
    // Many are left where codes differ much in length, for the longest decides the tolerance.
    count = refine(at.found, count, z + r * dim, norm[r], at.book, at.shape, scores);
    out[r] = nearest(at.found, count, z + r * dim, at.book, at.shape);
  }
}

// Returns false where bytes do not tell enough of a row.
template <int ROWS>
inline bool search_bytes(const float* z, const Search& at, int64_t* out) {
  const int64_t dim = at.shape.dim, size = padded(at.shape.codes);
  ByteRows rows;
  rows.starts = at.groups;
  rows.groups = at.groups + kSearchRows * at.split.chunks;
  // In two passes, so that the rows' chains of dependent operations overlap.
  float unit[ROWS];
  for (int r = 0; r < ROWS; r++) unit[r] = byte_unit(z + r * dim, dim, at.split, at.book);
  bool ok = true;
  for (int r = 0; r < ROWS; r++) ok &= round_bytes(unit[r], z + r * dim, dim, at.split, at.book, at.rounded, rows, r);
  if (!ok) return false;
  int16_t* scores = reinterpret_cast<int16_t*>(at.scores);
  int16_t best[ROWS];
  screen_bytes<ROWS>(rows, at.split, at.book, at.shape.cosine, size, scores, best);
  // Of all rows before any is compared: meanwhile the candidates' channels are on their way to the core.
  int32_t* candidates[ROWS];
  int64_t count[ROWS];
  for (int r = 0; r < ROWS; r++) {
    candidates[r] = r == 0 ? at.found : candidates[r - 1] + count[r - 1];
    const int32_t threshold = best[r] - rows.tolerance[r];
    if (threshold < -32768) return false;
    count[r] = collect(scores + r * size, at.shape.codes, splat_half(int16_t(threshold)), candidates[r]);
    if (count[r] > most_candidates(at.shape.codes)) return false;
    for (int64_t i = 0; i < count[r]; i++)
      for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(at.book.exact + candidates[r][i] * dim + d);
  }
  for (int r = 0; r < ROWS; r++) {
    const float norm = rows.norm[r] * at.book.bound[kNorm];
    count[r] = refine(candidates[r], count[r], z + r * dim, norm, at.book, at.shape, at.scores);
    out[r] = nearest(candidates[r], count[r], z + r * dim, at.book, at.shape);
  }
  return true;
}

template <int ROWS>
inline bool search_tile(int rows, bool in_bytes, const float* z, const Search& at, int64_t* out) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) return search_tile<ROWS - 1>(rows, in_bytes, z, at, out);
    if (in_bytes && search_bytes<ROWS>(z, at, out)) return true;
    search_shorts<ROWS>(z, at, out);
    return !in_bytes;
  }
  return true;
}

constexpr int kPause = 8;  // tiles for which bytes are not tried after they have failed

// out[n]: index of the code nearest to each of z[n][dim]. `found(codes, count)` is called as they become known.
template <class Found>
inline void search(const float* z, int64_t n, const Book& book, const Shape& shape, SearchScratch& scratch,
                   int64_t worker, int64_t* out, const Found& found) {
  const Search at{book, shape, byte_split(shape.dim), scratch.rounded + worker * scratch.rounded_size,
                  scratch.groups + worker * scratch.groups_size, scratch.scores + worker * scratch.scores_size,
                  scratch.found + worker * scratch.found_size};
  const bool has_bytes = book.bytes != nullptr && book.bound[kUnit] > 0.0f;
  for (int64_t i = 0, pause = 0; i < n; i += kSearchRows) {
    const int rows = n - i < kSearchRows ? int(n - i) : kSearchRows;
    const bool in_bytes = has_bytes && pause-- <= 0;
    if (!search_tile<kSearchRows>(rows, in_bytes, z + i * shape.dim, at, out + i)) pause = kPause;
    found(out + i, rows);
  }
}

}  // namespace AAR_ISA
}  // namespace aar
