// The few things that the kernels need of a GPU. emulate.h gives the same names to a host compiler, so that the very
// code of the kernels runs in tests on machines without a GPU.
#pragma once
#ifdef AAR_EMULATE
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cassert>
#include <cfloat>
#include <climits>
#include <cstdint>

#define AAR_DEVICE __device__ __forceinline__
#define AAR_BOTH __host__ __device__ inline
#define AAR_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define AAR_ARGUMENTS(Type) const __grid_constant__ Type

namespace aar::cuda {

AAR_DEVICE int thread_id() { return int(threadIdx.x); }
// Read anew each time, so that what follows from it is not kept in registers through hot loops elsewhere.
AAR_DEVICE int fresh_thread_id() {
  int id;
  asm volatile("mov.u32 %0, %tid.x;" : "=r"(id));
  return id;
}
AAR_DEVICE int block_id() { return int(blockIdx.x); }
AAR_DEVICE int block_count() { return int(gridDim.x); }
AAR_DEVICE unsigned char* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<unsigned char*>(memory);
}
AAR_DEVICE void sync_block() { __syncthreads(); }

// A cluster is one block before Hopper: then these cost nothing but the barrier.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
AAR_DEVICE int cluster_rank() { return int(__clusterRelativeBlockRank()); }
AAR_DEVICE int cluster_size() { return int(__clusterSizeInBlocks()); }
template <class T>
AAR_DEVICE T* at_rank(T* shared, int rank) {
  return static_cast<T*>(__cluster_map_shared_rank(shared, unsigned(rank)));
}
// Releases what the thread wrote, in any block's shared memory, to the threads of the cluster.
AAR_DEVICE void sync_cluster() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}
#else
AAR_DEVICE int cluster_rank() { return 0; }
AAR_DEVICE int cluster_size() { return 1; }
template <class T>
AAR_DEVICE T* at_rank(T* shared, int) {
  return shared;
}
AAR_DEVICE void sync_cluster() { __syncthreads(); }
#endif

template <class T>
AAR_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
AAR_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
AAR_DEVICE int atomic_add(int* at, int value) { return atomicAdd(at, value); }
AAR_DEVICE int atomic_max(int* at, int value) { return atomicMax(at, value); }
AAR_DEVICE void atomic_min(int* at, int value) { atomicMin(at, value); }
AAR_DEVICE void atomic_or(int* at, int value) { atomicOr(at, value); }
AAR_DEVICE void atomic_min(unsigned long long* at, unsigned long long value) { atomicMin(at, value); }

template <class T>
AAR_DEVICE T load_constant(const T* at) {  // of memory that nothing writes while the kernel runs
  return __ldg(at);
}
AAR_DEVICE float as_float(int bits) { return __int_as_float(bits); }
AAR_DEVICE int as_int(float value) { return __float_as_int(value); }
AAR_DEVICE long long as_long(double value) { return __double_as_longlong(value); }

// Two numbers rounded to bf16, `low` in the lower half.
AAR_DEVICE uint32_t round_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// sum[16][8] += a[16][16] * b[16][8] in bf16. Lane l holds rows l/4 and l/4 + 8: a.x and a.y the first row's columns
// 2(l%4) + {0, 1} and those + 8, a.z and a.w the second row's; b0 and b1 those rows of b's column l/4; sum[0..1] the
// first row's columns 2(l%4) + {0, 1}, sum[2..3] the second row's.
AAR_DEVICE void multiply_add(float (&sum)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a.x), "r"(a.z), "r"(a.y), "r"(a.w), "r"(b0), "r"(b1));
}

}  // namespace aar::cuda
#endif

namespace aar::cuda {

// Integers that compare as the numbers do.
AAR_DEVICE int ordered(float value) {
  const int bits = as_int(value);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
AAR_DEVICE float from_ordered(int key) { return as_float(key ^ ((key >> 31) & 0x7fffffff)); }
AAR_DEVICE unsigned long long ordered(double value) {
  const long long bits = as_long(value);
  return static_cast<unsigned long long>(bits) ^ (bits < 0 ? ~0ull : 1ull << 63);
}

AAR_DEVICE float4 add(const float4& a, const float4& b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }
AAR_DEVICE float4 add_scaled(const float4& a, const float4& b, float s) {
  return {fmaf(b.x, s, a.x), fmaf(b.y, s, a.y), fmaf(b.z, s, a.z), fmaf(b.w, s, a.w)};
}
AAR_DEVICE float4 divide(const float4& a, float s) { return {a.x / s, a.y / s, a.z / s, a.w / s}; }

// Hands out a block of memory piece by piece; started at null it counts.
struct Carver {
  unsigned char* at;
  template <class T>
  AAR_BOTH T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(at);
    at += (count * sizeof(T) + 15) / 16 * 16;
    return piece;
  }
};

// Channels [channel, channel + 4) of row[dim], zeros beyond its end; 16 bytes at once where rows are aligned to them.
template <class Load>
AAR_DEVICE float4 channels_by(const Load& load, const float* row, int channel, int dim) {
  if (dim % 4 == 0)
    return channel < dim ? load(reinterpret_cast<const float4*>(row + channel)) : float4{0, 0, 0, 0};
  return {channel < dim ? load(row + channel) : 0, channel + 1 < dim ? load(row + channel + 1) : 0,
          channel + 2 < dim ? load(row + channel + 2) : 0, channel + 3 < dim ? load(row + channel + 3) : 0};
}
AAR_DEVICE float4 load_channels(const float* row, int channel, int dim) {
  return channels_by([](const auto* at) { return load_constant(at); }, row, channel, dim);
}
AAR_DEVICE float4 reload_channels(const float* row, int channel, int dim) {  // of memory that the kernel writes
  return channels_by([](const auto* at) { return *at; }, row, channel, dim);
}
AAR_DEVICE void store_channels(float* row, int channel, int dim, const float4& value) {
  if (dim % 4 == 0) {
    if (channel < dim) *reinterpret_cast<float4*>(row + channel) = value;
    return;
  }
  if (channel < dim) row[channel] = value.x;
  if (channel + 1 < dim) row[channel + 1] = value.y;
  if (channel + 2 < dim) row[channel + 2] = value.z;
  if (channel + 3 < dim) row[channel + 3] = value.w;
}

}  // namespace aar::cuda
