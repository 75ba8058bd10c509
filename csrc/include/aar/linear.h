// Linear layers with prepacked weights over plain buffers: no framework, no Python.
//
// A weight W[N][K] lies in panels of 16 output channels, data[N / 16, rounded up][K][16] with zeros behind N, in fp32,
// bf16 or int8. The layout is the same for every instruction set. Products and sums are fp32 (fused multiply-add), in
// blocks of K whose sums are added up in order, so that a row's result depends neither on the rows beside it nor on the
// number of threads.
#pragma once
#include <cstdint>

#include "aar/isa.h"
#include "aar/thread_pool.h"

namespace aar {

constexpr int64_t kPanel = 16;

enum class Storage { fp32, bf16, int8 };

struct LinearWeight {
  Storage storage;
  const void* data;
  const float* scale;  // [N], value of one unit of an int8 row; null for the other kinds
  int64_t N, K;
};

struct LinearKernels {
  // out[M][N] = x[M][K] W^T + bias[N] (null: none), then GELU (its tanh form) where asked for.
  void (*forward)(const LinearWeight&, const float* x, int64_t M, const float* bias, bool gelu, float* out,
                  const ThreadPool&);
};

AAR_LEVELS(LinearKernels, linear_kernels)

}  // namespace aar
