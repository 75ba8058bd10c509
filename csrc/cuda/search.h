// Nearest code of each row, exactly: screen on the tensor cores in bf16, then compare in double what rounding cannot
// tell apart.
//
// A screened score is z'.e' - |e|^2 / 2 for the rounded row z' and code e'. By Cauchy-Schwarz it is off by at most
// |z - z'| |e| + |z'| |e - e'|, plus what the tensor core drops while it adds. Codes whose score is within twice that
// of the best are compared again, in double, from the fp32 inputs. With 64 channels and 1024 random codes these are
// about two per row.
#pragma once
#include "device.h"
#include "msrq.h"

namespace aar::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kChunk = 80;  // rows searched at once at most: the finest published scale in one go
constexpr int kCandidates = 2048;
constexpr int kNoCode = INT_MAX;  // the winner among no candidates

// What a row's `tolerance` says where it is not a tolerance.
constexpr float kEmptyRow = -1.0f;  // sees no frame, and gets no code
AAR_DEVICE bool is_screened(float tolerance) { return tolerance >= 0 && tolerance <= FLT_MAX; }

// One codebook, as `Packed` has it, and the tiles of it that this block searches.
struct Book {
  const uint4* fragments;
  const float *half_squares, *exact, *bound;
  int codes, first_tile, last_tile;
  bool cosine;
};

// Scratch of a block, in shared memory. All but the last two have a fixed size, so that their addresses are constants
// and take no registers.
struct Search {
  float* rows;                // [kChunk][width], zeros beyond dim
  uint4* fragments;           // [kChunk / 16][width / 16][32 lanes]: the rows in bf16, as operands of the tensor core
  float* tolerance;           // [kChunk]
  int* best;                  // [kChunk]: the largest score so far, as `ordered`
  int* crowded;               // [kChunk]: whether a candidate found no room
  uint2* candidates;          // [kCandidates]: row and code, score; later their costs
  uint32_t* survivors;        // [kCandidates]
  int* counts;                // [3]: candidates, survivors, rows that screening cannot help
  unsigned long long* least;  // [cluster][kChunk]: the smallest cost among each block's codes, as `ordered`
  int* winner;                // [cluster][kChunk]: the first code that has it
};

AAR_DEVICE uint32_t pack_candidate(int row, int code) { return uint32_t(row) << 22 | uint32_t(code); }
AAR_DEVICE int row_of(uint32_t candidate) { return int(candidate >> 22); }
AAR_DEVICE int code_of(uint32_t candidate) { return int(candidate & 0x3fffff); }

AAR_DEVICE Book book_of(const Encode& call, const Scale& scale, int width) {
  const int64_t b = scale.book;
  const int codes = call.tables.codes, tiles = call.padded_codes / kTileCodes;
  const int rank = cluster_rank(), size = cluster_size();
  return {static_cast<const uint4*>(call.packed.fragments) + b * call.padded_codes * (width / 8),
          call.packed.half_squares + b * call.padded_codes, call.packed.exact + b * codes * width,
          call.packed.bound + b * 3, codes, tiles * rank / size, tiles * (rank + 1) / size, call.cosine};
}

// Twice the error of a screened score, from the norms of the rounded row and of its rounding. A row too large to be
// squared in fp32 has an infinite one: then every code is compared in double.
//
// The terms: both roundings to bf16; the tensor core, which adds 17 terms a step, each cut off at 2^-22 of the largest
// at worst, in width / 16 <= 8 steps: 2^-14; half_squares and the subtraction, each rounded once. 2^-70 stands for the
// squares that underflowed; 2.001 covers the roundings of this function itself.
AAR_DEVICE float tolerance_of(float norm2, float error2, const float* bound) {
  const float norm = sqrtf(norm2) + 0x1p-70f, error = sqrtf(error2) + 0x1p-70f;
  const float largest = load_constant(bound), rounding = load_constant(bound + 1), square = load_constant(bound + 2);
  const float tolerance =
      2.001f * (error * largest + norm * rounding + 0x1p-14f * norm * largest + 0x1p-22f * square);
  return tolerance <= FLT_MAX ? tolerance : INFINITY;
}

// Puts channels [channel, channel + 4) of a row into the operand layout of device.h. A lane's 16 bytes hold, of rows r
// and r + 8, channels 4c to 4c + 3 of a step of 16: the order of channels within a step is free as long as codes have
// the same, and this one keeps four neighbours together.
AAR_DEVICE void store_fragment(uint4* fragments, int row, int channel, int width, uint32_t low, uint32_t high) {
  uint4* at = fragments + ((row / 16) * (width / 16) + channel / 16) * 32 + (row % 8) * 4 + (channel % 16) / 4;
  reinterpret_cast<uint2*>(at)[(row % 16) / 8] = uint2{low, high};
}

// A tile of codes in registers: they are read once, and meet all rows.
template <int WIDTH>
struct Tile {
  uint4 codes[kTileCodes / 8][WIDTH / 32];
  float half_squares[kTileCodes / 8][2];  // of the two codes whose scores this lane gets
};

template <int WIDTH>
AAR_DEVICE void load_tile(Tile<WIDTH>& tile, const Book& book, int index) {
  const int lane = thread_id() % 32;
#pragma unroll
  for (int v = 0; v < kTileCodes / 8; v++) {
    const int eight = index * (kTileCodes / 8) + v;
#pragma unroll
    for (int k = 0; k < WIDTH / 32; k++)
      tile.codes[v][k] = load_constant(book.fragments + (int64_t(eight) * (WIDTH / 32) + k) * 32 + lane);
    const float2 pair = load_constant(reinterpret_cast<const float2*>(book.half_squares + eight * 8 + lane % 4 * 2));
    tile.half_squares[v][0] = pair.x;
    tile.half_squares[v][1] = pair.y;
  }
}

// Scores of 16 rows against a tile: scores[v][0..1] of row lane / 4, scores[v][2..3] of row lane / 4 + 8.
template <int WIDTH>
AAR_DEVICE void score(const uint4* fragments, const Tile<WIDTH>& tile, float (&scores)[kTileCodes / 8][4]) {
#pragma unroll
  for (int v = 0; v < kTileCodes / 8; v++)
#pragma unroll
    for (int i = 0; i < 4; i++) scores[v][i] = 0;
#pragma unroll
  for (int k = 0; k < WIDTH / 32; k++) {
    const uint4 even = fragments[2 * k * 32 + thread_id() % 32], odd = fragments[(2 * k + 1) * 32 + thread_id() % 32];
#pragma unroll
    for (int v = 0; v < kTileCodes / 8; v++) {
      multiply_add(scores[v], even, tile.codes[v][k].x, tile.codes[v][k].y);
      multiply_add(scores[v], odd, tile.codes[v][k].z, tile.codes[v][k].w);
    }
  }
#pragma unroll
  for (int v = 0; v < kTileCodes / 8; v++)
#pragma unroll
    for (int i = 0; i < 4; i++) scores[v][i] -= tile.half_squares[v][i % 2];
}

// Raises the best score of a row to that of the tile, and notes the codes that may still be nearest. The four lanes of
// a row work together.
AAR_DEVICE void sift(const Search& search, int row, bool exists, const float (&scores)[kTileCodes / 8][4], int half,
                     int tile) {
  const int lane = thread_id() % 32;
  float top = scores[0][2 * half];
#pragma unroll
  for (int v = 0; v < kTileCodes / 8; v++) top = fmaxf(top, fmaxf(scores[v][2 * half], scores[v][2 * half + 1]));
  top = fmaxf(top, shuffle_xor(top, 1));
  top = fmaxf(top, shuffle_xor(top, 2));
  const float tolerance = exists ? search.tolerance[row] : kEmptyRow;
  const bool screened = is_screened(tolerance);
  int known = 0;
  if (lane % 4 == 0 && screened) known = atomic_max(search.best + row, ordered(top));
  known = shuffle(known, lane & ~3);
  if (!screened) return;
  // Other warps may raise the best meanwhile: then some candidates are noted in vain.
  const float threshold = fmaxf(top, from_ordered(known)) - tolerance;
  if (top < threshold) return;
#pragma unroll
  for (int v = 0; v < kTileCodes / 8; v++) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const float value = scores[v][2 * half + c];
      if (!(value >= threshold)) continue;
      const int code = tile * kTileCodes + v * 8 + lane % 4 * 2 + c;
      const int at = atomic_add(search.counts, 1);
      if (at < kCandidates) search.candidates[at] = uint2{pack_candidate(row, code), uint32_t(as_int(value))};
      else atomic_or(search.crowded + row, 1);
    }
  }
}

// Warps work on units of one tile of codes and a share of the rows, so that all have work even where the block's part
// of the codebook is small.
struct Units {
  int first_tile, shares, count;
  AAR_DEVICE int tile(int unit) const { return first_tile + unit / shares; }
};

AAR_DEVICE Units units_of(const Book& book) {
  const int tiles = book.last_tile - book.first_tile, shares = tiles >= kWarps || tiles == 0 ? 1 : kWarps / tiles;
  return {book.first_tile, shares, tiles * shares};
}

// The codes of a warp's first unit: asked for before the rows are known, they come while the block waits for those.
template <int WIDTH>
AAR_DEVICE void load_first_tile(Tile<WIDTH>& tile, const Book& book) {
  const Units units = units_of(book);
  if (thread_id() / 32 < units.count) load_tile(tile, book, units.tile(thread_id() / 32));
}

template <int WIDTH>
AAR_DEVICE void screen(const Search& search, const Book& book, Tile<WIDTH>& tile, int rows) {
  const Units units = units_of(book);
  const int blocks = (rows + 15) / 16, shares = units.shares, warp = thread_id() / 32, lane = thread_id() % 32;
#pragma unroll 1
  for (int unit = warp; unit < units.count; unit += kWarps) {
    const int index = units.tile(unit), share = unit % shares;
    if (unit != warp) load_tile(tile, book, index);
    // Warps begin at different rows: by the time a row's second tile comes, its best is known, and few codes pass.
#pragma unroll 1
    for (int i = share; i < blocks; i += shares) {
      const int block = shares == 1 ? (i + warp) % blocks : i;
      float scores[kTileCodes / 8][4];
      score<WIDTH>(search.fragments + block * (WIDTH / 16) * 32, tile, scores);
      const int row = block * 16 + lane / 4;
      sift(search, row, row < rows, scores, 0, index);
      sift(search, row + 8, row + 8 < rows, scores, 1, index);
    }
  }
}

// Squared distance (euclidean) or minus the product (cosine), in double, summed by four lanes in a fixed order.
template <int WIDTH>
AAR_DEVICE unsigned long long exact_cost(const float* row, const Book& book, int code) {
  const float* exact = book.exact + int64_t(code) * WIDTH;
  const int part = thread_id() % 4 * 4;
  double cost = 0;
#pragma unroll 2
  for (int d = 0; d < WIDTH; d += 16) {
    const float4 z = *reinterpret_cast<const float4*>(row + d + part);
    const float4 e = load_constant(reinterpret_cast<const float4*>(exact + d + part));
    const float a[4] = {z.x, z.y, z.z, z.w}, b[4] = {e.x, e.y, e.z, e.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const double difference = double(a[i]) - double(b[i]);
      cost += book.cosine ? -double(a[i]) * double(b[i]) : difference * difference;
    }
  }
  cost += shuffle_xor(cost, 1);
  cost += shuffle_xor(cost, 2);
  return ordered(cost);
}

// Among all of the block's codes, for rows that screening cannot help.
template <int WIDTH>
AAR_DEVICE void compare_all(const Search& search, const Book& book, int row, unsigned long long* least, int* winner) {
  const int begin = book.first_tile * kTileCodes;
  const int end = book.last_tile * kTileCodes < book.codes ? book.last_tile * kTileCodes : book.codes;
  // A code that was found among the candidates with room need not be the nearest.
  if (thread_id() == 0) winner[row] = kNoCode;
#pragma unroll 1
  for (int pass = 0; pass < 2; pass++) {
#pragma unroll 1
    for (int from = begin; from < end; from += kThreads / 4) {
      const int code = from + thread_id() / 4;
      const unsigned long long cost = exact_cost<WIDTH>(search.rows + row * WIDTH, book, code < end ? code : begin);
      if (code >= end || thread_id() % 4 != 0) continue;
      if (pass == 0) atomic_min(least + row, cost);
      else if (cost == least[row]) atomic_min(winner + row, code);
    }
    sync_block();
  }
}

// After `screen` and a barrier: the smallest cost of each row among the block's codes, and the first code that has it.
template <int WIDTH>
AAR_DEVICE void settle(const Search& search, const Book& book, int rows) {
  unsigned long long* least = search.least + cluster_rank() * kChunk;
  int* winner = search.winner + cluster_rank() * kChunk;
  const int noted = search.counts[0] < kCandidates ? search.counts[0] : kCandidates;
#pragma unroll 1
  for (int i = thread_id(); i < noted; i += kThreads) {
    const uint2 candidate = search.candidates[i];
    const int row = row_of(candidate.x);
    const float threshold = from_ordered(search.best[row]) - search.tolerance[row];
    if (as_float(int(candidate.y)) >= threshold && code_of(candidate.x) < book.codes)
      search.survivors[atomic_add(search.counts + 1, 1)] = candidate.x;
  }
  const auto compares_all = [&](int row) { return search.crowded[row] || search.tolerance[row] == INFINITY; };
#pragma unroll 1
  for (int row = thread_id(); row < rows; row += kThreads)
    if (compares_all(row)) atomic_add(search.counts + 2, 1);
  sync_block();
  // The candidates have been sifted: their memory now takes the survivors' costs.
  unsigned long long* costs = reinterpret_cast<unsigned long long*>(search.candidates);
  const int left = search.counts[1];
#pragma unroll 1
  for (int from = 0; from < left; from += kThreads / 4) {
    const int i = from + thread_id() / 4;
    const uint32_t survivor = search.survivors[i < left ? i : 0];
    const unsigned long long cost =
        exact_cost<WIDTH>(search.rows + row_of(survivor) * WIDTH, book, code_of(survivor));
    if (i >= left || thread_id() % 4 != 0) continue;
    costs[i] = cost;
    atomic_min(least + row_of(survivor), cost);
  }
  sync_block();
#pragma unroll 1
  for (int i = thread_id(); i < left; i += kThreads)
    if (costs[i] == least[row_of(search.survivors[i])])
      atomic_min(winner + row_of(search.survivors[i]), code_of(search.survivors[i]));
  sync_block();
#pragma unroll 1
  for (int row = 0; row < rows && search.counts[2] > 0; row++)
    if (compares_all(row)) compare_all<WIDTH>(search, book, row, least, winner);
}

}  // namespace aar::cuda
