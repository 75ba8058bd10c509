// C[M][N] += A B for the small products of the quantizer (dim 8 to 128 a side): register tiles over packed panels of B.
#pragma once
#include "simd.h"

namespace aar {
namespace AAR_ISA {

constexpr int kTileRows = kRegisters == 32 ? 12 : 6;
constexpr int kTileColumns = 2 * kLanes;

// C += A.B, or C = A.B without ADD, for one tile of whole vectors. Row k of B's panel is at panel + k * panel_row.
// Not inlined: among its callers' variables the compiler spills the accumulators. Unrolled from the start: else it keeps
// them in memory at both ends of the loop.
template <int ROWS, bool ADD = true>
__attribute__((noinline)) void gemm_tile(const float* a, int64_t a_row, int64_t a_k, const float* panel,
                                         int64_t panel_row, int64_t depth, float* c, int64_t c_row) {
  Floats sum[ROWS][2];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = splat(0.0f);
  for (int64_t k = 0; k < depth; k++) {
    const Floats b0 = load(panel + k * panel_row), b1 = load(panel + k * panel_row + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
      const Floats x = splat(a[r * a_row + k * a_k]);
      sum[r][0] = fma(x, b0, sum[r][0]);
      sum[r][1] = fma(x, b1, sum[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++) {
    float* out = c + r * c_row;
    store(out, ADD ? load(out) + sum[r][0] : sum[r][0]);
    store(out + kLanes, ADD ? load(out + kLanes) + sum[r][1] : sum[r][1]);
  }
}

// The same for up to ROWS rows.
template <int ROWS, bool ADD = true>
inline void gemm_edge(int rows, const float* a, int64_t a_row, int64_t a_k, const float* panel, int64_t panel_row,
                      int64_t depth, float* c, int64_t c_row) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return gemm_tile<ROWS, ADD>(a, a_row, a_k, panel, panel_row, depth, c, c_row);
    gemm_edge<ROWS - 1, ADD>(rows, a, a_row, a_k, panel, panel_row, depth, c, c_row);
  }
}

// A is a[m * a_row + k * a_k], B is b[k][N], C is c[M][N]. `panel` is scratch of depth * kTileColumns floats.
inline void gemm_accumulate(int64_t M, int64_t N, int64_t depth, const float* a, int64_t a_row, int64_t a_k,
                            const float* b, float* c, float* panel) {
  for (int64_t n = 0; n < N; n += kTileColumns) {
    const int columns = N - n < kTileColumns ? int(N - n) : kTileColumns;
    for (int64_t k = 0; k < depth; k++)
      for (int j = 0; j < kTileColumns; j++) panel[k * kTileColumns + j] = j < columns ? b[k * N + n + j] : 0.0f;
    for (int64_t m = 0; m < M; m += kTileRows) {
      const int rows = M - m < kTileRows ? int(M - m) : kTileRows;
      const float* left = a + m * a_row;
      float* out = c + m * N + n;
      if (columns == kTileColumns) {
        gemm_edge<kTileRows>(rows, left, a_row, a_k, panel, kTileColumns, depth, out, N);
        continue;
      }
      float tile[kTileRows * kTileColumns];
      gemm_edge<kTileRows, false>(rows, left, a_row, a_k, panel, kTileColumns, depth, tile, kTileColumns);
      for (int r = 0; r < rows; r++)
        for (int j = 0; j < columns; j++) out[r * N + j] += tile[r * kTileColumns + j];
    }
  }
}

}  // namespace AAR_ISA
}  // namespace aar
