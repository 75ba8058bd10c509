// Linear layers with prepacked weights: register tiles that read the weight as it is stored and widen it on the way.
//
// With few rows the bound is the weight's way from memory, with many it is multiply-adds. One loop serves both: a task
// takes a few panels, goes through K in blocks, and multiplies each block of a panel with its rows, in tiles of up to
// kTileRows. The first tile brings the block into the L1 cache, and the tiles fetch what comes next meanwhile.
// Widening bf16 and int8 in the tile costs nothing measurable: multiply-adds leave those units free.
#pragma once
#include <algorithm>

#include "aar/linear.h"
#include "gelu.h"
#include "gemm.h"
#include "simd.h"

namespace aar {
namespace AAR_ISA {

constexpr int64_t kDepth = 256;       // of a block: what is summed up in registers, and added to the other blocks' sums
constexpr int64_t kGroupPanels = 8;   // that share a block of rows in the L2 cache
constexpr int64_t kChunkRows = 192;   // that share a group of panels
constexpr int64_t kFetchAhead = 1024; // bytes ahead in each panel where each block is read once

struct Bf16 {
  uint16_t bits;
};

// kLanes weights as floats.
inline Floats widen(const float* w) { return load(w); }
inline Floats widen(const Bf16* w) {
#if defined(__AVX512F__)
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)w)), 16);
#elif defined(__AVX2__)
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)w)), 16);
#else
  Ints bits;
  for (int i = 0; i < kLanes; i++) bits[i] = int32_t(uint32_t(w[i].bits) << 16);
  return (Floats)bits;
#endif
}
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

// Vectors of output channels that a tile which has the weight to itself takes: as many as leave registers for operands.
constexpr int vectors_alone(int rows) {
  int vectors = 2;
  while (vectors < 8 && rows * vectors * 2 <= kRegisters * 3 / 4) vectors *= 2;
  return vectors;
}
constexpr int panels_of(int vectors) { return (vectors * kLanes + int(kPanel) - 1) / int(kPanel); }

// What a tile multiplies: `depth` steps of K, a vector or more of each panel.
template <class Weight>
struct Block {
  const Weight* weight;
  int64_t panel, last;  // distance from one panel to the next, and how many follow the first
  int64_t depth;
  int64_t ahead, ahead_step;  // bytes from a panel to what is fetched meanwhile, and how far that moves at each step
};

// sums[panel][row][kPanel] (+)= x[ROWS][kDepth] times a block. Panels behind the last one are the last one again.
// Not inlined: among its callers' variables the compiler would spill the sums.
template <int ROWS, int VECTORS, class Weight>
__attribute__((noinline)) void linear_tile(const float* x, const Block<Weight>& block, float* sums, int64_t sums_panel,
                                           bool first) {
  constexpr int panels = panels_of(VECTORS), vectors = VECTORS / panels;
  const Weight* w[panels];
  for (int p = 0; p < panels; p++) w[p] = block.weight + std::min<int64_t>(p, block.last) * block.panel;
  const int64_t depth = block.depth, step = block.ahead_step;
  int64_t ahead = block.ahead;
  Floats sum[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < depth; k++, ahead += step) {
    for (int p = 0; p < panels; p++) __builtin_prefetch(reinterpret_cast<const char*>(w[p]) + ahead);
    if constexpr (ROWS < VECTORS) {
      Floats a[ROWS];
      for (int r = 0; r < ROWS; r++) a[r] = splat(x[r * kDepth + k]);
      for (int v = 0; v < VECTORS; v++) {
        const Floats b = widen(w[v / vectors] + k * kPanel + v % vectors * kLanes);
        for (int r = 0; r < ROWS; r++) sum[r][v] = fma(a[r], b, sum[r][v]);
      }
    } else {
      Floats b[VECTORS];
      for (int v = 0; v < VECTORS; v++) b[v] = widen(w[v / vectors] + k * kPanel + v % vectors * kLanes);
      for (int r = 0; r < ROWS; r++) {
        const Floats a = splat(x[r * kDepth + k]);
        for (int v = 0; v < VECTORS; v++) sum[r][v] = fma(a, b[v], sum[r][v]);
      }
    }
  }
  for (int v = 0; v < VECTORS; v++) {
    float* out = sums + v / vectors * sums_panel + v % vectors * kLanes;
    for (int r = 0; r < ROWS; r++) store(out + r * kPanel, first ? sum[r][v] : load(out + r * kPanel) + sum[r][v]);
  }
}

// The tile of `rows` rows; `alone` says that no other tile reads the block.
template <int ROWS, class Weight>
void multiply_block(int rows, bool alone, const float* x, const Block<Weight>& block, float* sums, int64_t sums_panel,
                    bool first) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) return multiply_block<ROWS - 1>(rows, alone, x, block, sums, sums_panel, first);
    constexpr int vectors = vectors_alone(ROWS);
    if (alone) return linear_tile<ROWS, vectors>(x, block, sums, sums_panel, first);
    linear_tile<ROWS, 2>(x, block, sums, sums_panel, first);
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

// Panels [p0, p1) times the rows of tiles [t0, t1). `sums` has room for the panels, rounded up to a tile's.
template <class Weight>
void multiply(const LinearWeight& weight, const Tiles& tiles, int64_t p0, int64_t p1, int64_t t0, int64_t t1,
              float* sums, const Output& to) {
  const bool alone = tiles.tiles == 1;
  const int64_t step = panels_of(alone ? vectors_alone(int(tiles.rows)) : 2);
  const int64_t panel = weight.K * kPanel, first_row = tiles.begin(t0), sums_panel = (tiles.begin(t1) - first_row) * kPanel;
  const Weight* data = static_cast<const Weight*>(weight.data);
  for (int64_t b = 0; b < tiles.blocks; b++) {
    const int64_t depth = std::min(kDepth, weight.K - b * kDepth);
    for (int64_t p = p0; p < p1; p += step) {
      Block<Weight> block{data + p * panel + b * kDepth * kPanel, panel, p1 - 1 - p, depth, 0, 0};
      // Next come the same block of the panels beside, the next block of this group, or the next group.
      const int64_t weights = p + step < p1 ? step * panel : b + 1 < tiles.blocks ? (p0 - p) * panel + kDepth * kPanel : (p1 - p) * panel - b * kDepth * kPanel;
      const int64_t row_bytes = kPanel * sizeof(Weight);
      block.ahead = alone ? kFetchAhead : weights * int64_t(sizeof(Weight));
      block.ahead_step = alone ? row_bytes : row_bytes / (t1 - t0);
      for (int64_t t = t0; t < t1; t++) {
        float* out = sums + (p - p0) * sums_panel + (tiles.begin(t) - first_row) * kPanel;
        multiply_block<kTileRows>(int(tiles.size(t)), alone, tiles.block(t, b), block, out, sums_panel, b == 0);
        if (!alone) block.ahead += depth * block.ahead_step;
      }
    }
  }
  for (int64_t p = p0; p < p1; p++)
    finish_panel(sums + (p - p0) * sums_panel, first_row, tiles.begin(t1), p, to);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Weight>
void linear_forward(const LinearWeight& weight, const float* x, int64_t M, const Output& to, const ThreadPool& pool) {
  Tiles tiles{x, M, divide_up(M, kTileRows), divide_up(weight.K, kDepth)};
  Buffer<float> packed(M == 1 ? 0 : M * tiles.blocks * kDepth);
  if (M > 1) {  // one row is in its tile's order as it is
    tiles.x = packed;
    parallel(pool, tiles.tiles, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) pack_rows(x, weight.K, tiles, t, packed + tiles.begin(t) * tiles.blocks * kDepth);
    });
  }
  // Tasks are groups of panels times chunks of rows; how they are cut changes no result.
  const int64_t panels = divide_up(weight.N, kPanel);
  const int64_t step = panels_of(tiles.tiles == 1 ? vectors_alone(int(M)) : 2);
  const int64_t share = divide_up(divide_up(panels, pool.threads), step) * step;
  const int64_t group = tiles.tiles == 1 ? step : std::min(kGroupPanels, share);
  const int64_t groups = divide_up(panels, group);
  const int64_t chunks = std::min(tiles.tiles, std::max(divide_up(M, kChunkRows), divide_up(pool.threads, groups)));
  const int64_t room = group * (divide_up(tiles.tiles, chunks) * kTileRows) * kPanel;
  parallel(pool, groups * chunks, [&](int64_t begin, int64_t end) {
    Buffer<float> sums(room);
    for (int64_t task = begin; task < end; task++) {
      const int64_t g = task / chunks, c = task % chunks;
      multiply<Weight>(weight, tiles, g * group, std::min((g + 1) * group, panels), tiles.tiles * c / chunks,
                       tiles.tiles * (c + 1) / chunks, sums, to);
    }
  });
}

inline void linear(const LinearWeight& weight, const float* x, int64_t M, const float* bias, bool gelu, float* out,
                   const ThreadPool& pool) {
  if (M == 0) return;
  const Output to{weight.scale, bias, gelu, out, weight.N};
  switch (weight.storage) {
    case Storage::fp32: return linear_forward<float>(weight, x, M, to, pool);
    case Storage::bf16: return linear_forward<Bf16>(weight, x, M, to, pool);
    case Storage::int8: return linear_forward<int8_t>(weight, x, M, to, pool);
  }
}

}  // namespace AAR_ISA
}  // namespace aar

// Where a level's file instantiates the table of kernels.
#define AAR_DEFINE_LINEAR(LEVEL) const aar::LinearKernels aar::linear_kernels_##LEVEL = {AAR_ISA::linear};
