// Linear layers with prepacked weights: register tiles that read the weight as it is stored and widen it on the way.
//
// With few rows the bound is the weight's way from memory, with many it is multiply-adds. One loop serves both: a task
// takes a few panels, goes through K in blocks, and multiplies each block of a panel with its rows, in tiles of up to
// kRows. The first tile brings the block into the L1 cache, and the tiles fetch what comes next meanwhile.
// Widening bf16 and int8 in the tile costs nothing measurable: multiply-adds leave those units free.
#pragma once
#include <algorithm>

#include "aar/linear.h"
#include "gelu.h"
#include "storage.h"

namespace aar {
namespace AAR_ISA {

constexpr int64_t kDepth = 256;        // of a block
constexpr int64_t kChain = 64;         // steps of K that are summed up in registers, before rounding errors add up
constexpr int64_t kGroupPanels = 8;    // that share a block of rows in the L2 cache
constexpr int64_t kChunkRows = 192;    // that share a group of panels
constexpr int64_t kFetchAhead = 1024;  // bytes ahead in each panel where each block is read once

// A tile of sums: rows times vectors of output channels, whole panels.
constexpr int kVectors = kLanes * 2 < kPanel ? kPanel / kLanes : 2;
constexpr int kRows = kRegisters == 32 ? 12 : kVectors == 2 ? 6 : 3;

// kLanes weights as floats.
inline Floats widen(const float* w) { return load(w); }
inline Floats widen(const BFloat16* w) { return load(w); }
inline Floats widen(const int8_t* w) {
#if defined(__AVX512F__)
  return to_floats((Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)w)));
#elif defined(__AVX2__)
  return to_floats((Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)w)));
#else
  Ints v;
  for (int i = 0; i < kLanes; i++) v[i] = w[i];
  return to_floats(v);
#endif
}

// Vectors of a tile that has the weight to itself: as many as leave registers for the operands.
constexpr int vectors_alone(int rows) {
  int vectors = kVectors;
  while (vectors < 8 && rows * vectors * 2 <= kRegisters * 3 / 4) vectors *= 2;
  return vectors;
}
constexpr int panels_of(int vectors) { return vectors * kLanes / int(kPanel); }

// What a tile multiplies: `depth` steps of K, a vector or more of each panel.
template <class Weight>
struct Block {
  const Weight* weight;
  int64_t panel, last;  // distance from one panel to the next, and how many follow the first
  int64_t depth;
  int64_t ahead, ahead_step;  // bytes from a panel to what is fetched meanwhile, and how far that moves at each step
};

// Without it GCC keeps the sums in memory before and after the loop over K.
#define AAR_UNROLL _Pragma("GCC unroll 16")

// sums[panel][row][kPanel] (+)= x[ROWS][kDepth] times a block. Panels behind the last one are the last one again.
// Not inlined: among its callers' variables the compiler would spill the sums.
template <int ROWS, int VECTORS, class Weight>
__attribute__((noinline)) void linear_tile(const float* x, const Block<Weight>& block, float* sums, int64_t sums_panel,
                                           bool first) {
  constexpr int panels = panels_of(VECTORS), vectors = VECTORS / panels;
  const Weight* w[panels];
  AAR_UNROLL for (int p = 0; p < panels; p++) w[p] = block.weight + std::min<int64_t>(p, block.last) * block.panel;
  const int64_t depth = block.depth, step = block.ahead_step;
  int64_t ahead = block.ahead;
  for (int64_t begin = 0; begin < depth; begin += kChain, first = false) {
    Floats sum[ROWS][VECTORS];
    AAR_UNROLL for (int r = 0; r < ROWS; r++)
      AAR_UNROLL for (int v = 0; v < VECTORS; v++) sum[r][v] = splat(0.0f);
    const int64_t end = std::min(begin + kChain, depth);
    // So few rounds that the end of the loop is predicted.
    _Pragma("GCC unroll 4") for (int64_t k = begin; k < end; k++, ahead += step) {
      AAR_UNROLL for (int p = 0; p < panels; p++) __builtin_prefetch(reinterpret_cast<const char*>(w[p]) + ahead);
      if constexpr (ROWS < VECTORS) {
        Floats a[ROWS];
        AAR_UNROLL for (int r = 0; r < ROWS; r++) a[r] = splat(x[r * kDepth + k]);
        AAR_UNROLL for (int v = 0; v < VECTORS; v++) {
          const Floats b = widen(w[v / vectors] + k * kPanel + v % vectors * kLanes);
          AAR_UNROLL for (int r = 0; r < ROWS; r++) sum[r][v] = fma(a[r], b, sum[r][v]);
        }
      } else {
        Floats b[VECTORS];
        AAR_UNROLL for (int v = 0; v < VECTORS; v++)
          b[v] = widen(w[v / vectors] + k * kPanel + v % vectors * kLanes);
        AAR_UNROLL for (int r = 0; r < ROWS; r++) {
          const Floats a = splat(x[r * kDepth + k]);
          AAR_UNROLL for (int v = 0; v < VECTORS; v++) sum[r][v] = fma(a, b[v], sum[r][v]);
        }
      }
    }
    AAR_UNROLL for (int v = 0; v < VECTORS; v++) {
      float* out = sums + v / vectors * sums_panel + v % vectors * kLanes;
      AAR_UNROLL for (int r = 0; r < ROWS; r++, out += kPanel) store(out, first ? sum[r][v] : load(out) + sum[r][v]);
    }
  }
}

#undef AAR_UNROLL

// The tile of `rows` rows; `alone` says that no other tile reads the block.
template <int ROWS, class Weight>
void multiply_block(int rows, bool alone, const float* x, const Block<Weight>& block, float* sums, int64_t sums_panel,
                    bool first) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) return multiply_block<ROWS - 1>(rows, alone, x, block, sums, sums_panel, first);
    constexpr int vectors = vectors_alone(ROWS);
    if constexpr (ROWS >= kRows / 2)  // no smaller ones, where there are several
      if (!alone) return linear_tile<ROWS, kVectors>(x, block, sums, sums_panel, first);
    linear_tile<ROWS, vectors>(x, block, sums, sums_panel, first);
  }
}

// Rows in tiles of nearly equal size, each tile in blocks of K: [tile][block][row][kDepth].
struct Tiles {
  const float* x;
  int64_t rows, tiles, blocks;

  int64_t begin(int64_t tile) const { return rows * tile / tiles; }
  int64_t size(int64_t tile) const { return begin(tile + 1) - begin(tile); }
  const float* block(int64_t tile, int64_t b) const {
    return x + (begin(tile) * blocks + b * size(tile)) * kDepth;
  }
};

inline void pack_rows(const float* x, int64_t K, const Tiles& tiles, int64_t tile, float* packed) {
  for (int64_t b = 0; b < tiles.blocks; b++)
    for (int64_t r = 0; r < tiles.size(tile); r++) {
      const float* row = x + (tiles.begin(tile) + r) * K + b * kDepth;
      std::copy(row, row + std::min(kDepth, K - b * kDepth), packed);
      packed += kDepth;
    }
}

struct Output {
  const float *scale, *bias;  // [N] or null
  bool gelu;
  float* out;  // [M][N]
  int64_t N;
};

// out[row][panel's channels] = activation(sums[row][kPanel] * scale + bias).
inline void finish_panel(const float* sums, int64_t begin, int64_t end, int64_t panel, const Output& to) {
  const int64_t n = panel * kPanel, columns = std::min(kPanel, to.N - n);
  float scale[kPanel], bias[kPanel];
  for (int64_t j = 0; j < kPanel; j++) {
    scale[j] = to.scale && j < columns ? to.scale[n + j] : 1.0f;
    bias[j] = to.bias && j < columns ? to.bias[n + j] : 0.0f;
  }
  for (int64_t row = begin; row < end; row++, sums += kPanel) {
    float values[kPanel];
    for (int64_t j = 0; j < kPanel; j += kLanes) {
      const Floats y = fma(load(sums + j), load(scale + j), load(bias + j));
      store(values + j, to.gelu ? gelu_tanh(y) : y);
    }
    std::copy(values, values + columns, to.out + row * to.N + n);
  }
}

// A task: panels [p0, p1) times the rows of tiles [t0, t1). `sums` has room for the panels, rounded up to a tile's.
template <class Weight>
void multiply(const LinearWeight& weight, const Tiles& tiles, int64_t p0, int64_t p1, int64_t t0, int64_t t1,
              float* sums, const Output& to) {
  constexpr int64_t row_bytes = kPanel * sizeof(Weight);
  const bool alone = tiles.tiles == 1;
  const int64_t step = panels_of(alone ? vectors_alone(int(tiles.rows)) : kVectors);
  const int64_t first_row = tiles.begin(t0), last_row = tiles.begin(t1);
  const int64_t panel = weight.K * kPanel, sums_panel = (last_row - first_row) * kPanel;
  const Weight* data = static_cast<const Weight*>(weight.data);
  for (int64_t b = 0; b < tiles.blocks; b++) {
    for (int64_t p = p0; p < p1; p += step) {
      // What follows this block: that of the panels beside, else the next of the first panels, else another group's.
      const bool more_panels = p + step < p1, more_depth = b + 1 < tiles.blocks;
      const int64_t next_panel = more_panels ? p + step : more_depth ? p0 : p1;
      const int64_t next_depth = more_panels ? b : more_depth ? b + 1 : 0;
      Block<Weight> block{data + p * panel + b * kDepth * kPanel, panel, p1 - 1 - p,
                          std::min(kDepth, weight.K - b * kDepth), kFetchAhead, row_bytes};
      if (!alone) {
        block.ahead = ((next_panel - p) * weight.K + (next_depth - b) * kDepth) * row_bytes;
        block.ahead_step = row_bytes / (t1 - t0);
      }
      for (int64_t t = t0; t < t1; t++) {
        float* out = sums + (p - p0) * sums_panel + (tiles.begin(t) - first_row) * kPanel;
        multiply_block<kRows>(int(tiles.size(t)), alone, tiles.block(t, b), block, out, sums_panel, b == 0);
        block.ahead += block.depth * block.ahead_step;  // each tile fetches its share
      }
    }
  }
  for (int64_t p = p0; p < p1; p++) finish_panel(sums + (p - p0) * sums_panel, first_row, last_row, p, to);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Weight>
void linear_with(const LinearWeight& weight, const float* x, int64_t M, const Output& to, const ThreadPool& pool) {
  Tiles tiles{x, M, divide_up(M, kRows), divide_up(weight.K, kDepth)};
  Buffer<float> packed(M == 1 ? 0 : M * tiles.blocks * kDepth);
  if (M > 1) {  // a single row is in order as it is
    tiles.x = packed;
    parallel(pool, tiles.tiles, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++)
        pack_rows(x, weight.K, tiles, t, packed + tiles.begin(t) * tiles.blocks * kDepth);
    });
  }
  // Tasks are groups of panels times chunks of rows. How they are cut changes no result.
  const bool alone = tiles.tiles == 1;
  const int64_t panels = divide_up(weight.N, kPanel);
  const int64_t step = panels_of(alone ? vectors_alone(int(M)) : kVectors);
  const int64_t share = divide_up(divide_up(panels, pool.threads), step) * step;
  const int64_t group = alone ? step : std::min(kGroupPanels, share), groups = divide_up(panels, group);
  const int64_t chunks = std::min(tiles.tiles, std::max(divide_up(M, kChunkRows), divide_up(pool.threads, groups)));
  const int64_t room = group * kPanel * divide_up(tiles.tiles, chunks) * kRows;
  parallel(pool, groups * chunks, [&](int64_t begin, int64_t end) {
    Buffer<float> sums(room);
    for (int64_t task = begin; task < end; task++) {
      const int64_t g = task / chunks, c = task % chunks;  // chunks that share panels follow each other
      multiply<Weight>(weight, tiles, g * group, std::min((g + 1) * group, panels), tiles.tiles * c / chunks,
                       tiles.tiles * (c + 1) / chunks, sums, to);
    }
  });
}

inline void linear_forward(const LinearWeight& weight, const float* x, int64_t M, const float* bias, bool gelu,
                           float* out, const ThreadPool& pool) {
  if (M == 0) return;
  const Output to{weight.scale, bias, gelu, out, weight.N};
  switch (weight.storage) {
    case Storage::fp32: return linear_with<float>(weight, x, M, to, pool);
    case Storage::bf16: return linear_with<BFloat16>(weight, x, M, to, pool);
    case Storage::int8: return linear_with<int8_t>(weight, x, M, to, pool);
  }
}

}  // namespace AAR_ISA
}  // namespace aar

// Where a level's file instantiates the table of kernels.
#define AAR_DEFINE_LINEAR(LEVEL) const aar::LinearKernels aar::linear_kernels_##LEVEL = {AAR_ISA::linear_forward};
