// The device of device.h in plain C++: every CUDA thread is a fiber, and blocks of a cluster run side by side.
//
// Fibers give way at barriers and at collective operations of a warp alone, in an order drawn from a seed: a kernel
// that lacks a barrier gives different results for different seeds. Shared memory is one allocation of exactly the size
// asked for, filled with NaN: AddressSanitizer sees a step outside, and reading what nobody wrote shows.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define AAR_DEVICE inline
#define AAR_BOTH inline
#define AAR_KERNEL(threads, blocks) void
#define AAR_ARGUMENTS(Type) const Type

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};

namespace aar::cuda {
namespace emulation {

struct Fiber;

struct Barrier {
  int expected = 0;
  std::vector<Fiber*> waiting = {};
};

struct Warp {
  Barrier barrier{32};
  alignas(16) unsigned char slots[32][32];
};

struct Block {
  int id, rank;
  std::unique_ptr<unsigned char[]> shared;
  Barrier barrier;
  std::vector<Warp> warps;
};

struct Fiber {
  ucontext_t begin;
  jmp_buf at;
  std::unique_ptr<unsigned char[]> stack;
  Block* block;
  int thread;
  bool begun = false;
};

struct Machine {
  jmp_buf scheduler;
  std::vector<std::unique_ptr<Block>> blocks;  // of the cluster that runs
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> ready;
  Fiber* current = nullptr;
  Barrier cluster;
  int grid = 0;
  std::function<void()> kernel;
};
inline Machine machine;

// setcontext starts a fiber on its stack; from there jumps are an order of magnitude faster, as they leave signals be.
inline void enter(Fiber* fiber) {
  machine.current = fiber;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber->begun) _longjmp(fiber->at, 1);
  fiber->begun = true;
  setcontext(&fiber->begin);
}

inline void leave() {
  if (_setjmp(machine.current->at) == 0) _longjmp(machine.scheduler, 1);
}

inline void run_thread() {
  machine.kernel();
  _longjmp(machine.scheduler, 1);
}

inline void wait(Barrier& barrier) {
  barrier.waiting.push_back(machine.current);
  if (int(barrier.waiting.size()) == barrier.expected) {
    machine.ready.insert(machine.ready.end(), barrier.waiting.begin(), barrier.waiting.end());
    barrier.waiting.clear();
  }
  leave();
}

// What each lane of the warp gave.
template <class T>
inline std::array<T, 32> gather(const T& value) {
  static_assert(sizeof(T) <= sizeof(Warp::slots[0]));
  Warp& warp = machine.current->block->warps[machine.current->thread / 32];
  std::memcpy(warp.slots[machine.current->thread % 32], &value, sizeof(T));
  wait(warp.barrier);
  std::array<T, 32> all;
  for (int lane = 0; lane < 32; lane++) std::memcpy(&all[lane], warp.slots[lane], sizeof(T));
  wait(warp.barrier);
  return all;
}

inline void add_thread(Block* block, int thread) {
  constexpr size_t kStack = 64 << 10;
  auto fiber = std::make_unique<Fiber>();
  fiber->stack.reset(new unsigned char[kStack]);
  fiber->block = block;
  fiber->thread = thread;
  getcontext(&fiber->begin);
  fiber->begin.uc_stack.ss_sp = fiber->stack.get();
  fiber->begin.uc_stack.ss_size = kStack;
  fiber->begin.uc_link = nullptr;
  makecontext(&fiber->begin, run_thread, 0);
  machine.ready.push_back(fiber.get());
  machine.fibers.push_back(std::move(fiber));
}

inline void run_cluster(int first, int cluster, int threads, size_t shared, std::mt19937& random) {
  machine.blocks.clear();
  machine.fibers.clear();
  machine.ready.clear();
  machine.cluster = {cluster * threads};
  for (int rank = 0; rank < cluster; rank++) {
    auto block = std::make_unique<Block>();
    block->id = first + rank, block->rank = rank;
    block->shared.reset(new unsigned char[shared]);
    std::memset(block->shared.get(), 0xff, shared);
    block->barrier.expected = threads;
    block->warps.resize(threads / 32);
    for (int thread = 0; thread < threads; thread++) add_thread(block.get(), thread);
    machine.blocks.push_back(std::move(block));
  }
  while (!machine.ready.empty()) {
    std::swap(machine.ready[random() % machine.ready.size()], machine.ready.back());
    Fiber* fiber = machine.ready.back();
    machine.ready.pop_back();
    enter(fiber);
  }
  bool stuck = !machine.cluster.waiting.empty();
  for (auto& block : machine.blocks) {
    stuck |= !block->barrier.waiting.empty();
    for (Warp& warp : block->warps) stuck |= !warp.barrier.waiting.empty();
  }
  if (stuck) {
    std::fputs("emulation: threads wait at different barriers\n", stderr);
    std::abort();
  }
}

// Runs kernel() in `blocks` blocks, cluster after cluster.
inline void launch(std::function<void()> kernel, int blocks, int cluster, int threads, size_t shared, unsigned seed) {
  std::mt19937 random(seed);
  machine.kernel = std::move(kernel);
  machine.grid = blocks;
  for (int first = 0; first < blocks; first += cluster) run_cluster(first, cluster, threads, shared, random);
}

inline float bf16(uint32_t pair, int high) { return std::bit_cast<float>(high ? pair & 0xffff0000u : pair << 16); }

}  // namespace emulation

inline int thread_id() { return emulation::machine.current->thread; }
inline int fresh_thread_id() { return thread_id(); }
inline int block_id() { return emulation::machine.current->block->id; }
inline int block_count() { return emulation::machine.grid; }
inline unsigned char* shared_memory() { return emulation::machine.current->block->shared.get(); }
inline void sync_block() { emulation::wait(emulation::machine.current->block->barrier); }
inline void sync_cluster() { emulation::wait(emulation::machine.cluster); }
inline int cluster_rank() { return emulation::machine.current->block->rank; }
inline int cluster_size() { return int(emulation::machine.blocks.size()); }
template <class T>
inline T* at_rank(T* shared, int rank) {
  const auto offset = reinterpret_cast<unsigned char*>(shared) - shared_memory();
  return reinterpret_cast<T*>(emulation::machine.blocks[rank]->shared.get() + offset);
}

template <class T>
inline T shuffle_xor(T value, int mask) {
  return emulation::gather(value)[(thread_id() % 32) ^ mask];
}
template <class T>
inline T shuffle(T value, int lane) {
  return emulation::gather(value)[lane];
}
inline int atomic_add(int* at, int value) { return std::exchange(*at, *at + value); }
inline int atomic_max(int* at, int value) { return std::exchange(*at, std::max(*at, value)); }
inline void atomic_min(int* at, int value) { *at = std::min(*at, value); }
inline void atomic_or(int* at, int value) { *at |= value; }
inline void atomic_min(unsigned long long* at, unsigned long long value) { *at = std::min(*at, value); }

template <class T>
inline T load_constant(const T* at) {
  return *at;
}
inline float as_float(int bits) { return std::bit_cast<float>(bits); }
inline int as_int(float value) { return std::bit_cast<int>(value); }
inline long long as_long(double value) { return std::bit_cast<long long>(value); }

inline uint32_t round_pair(float low, float high) {
  const auto round = [](float value) -> uint32_t {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    if (std::isnan(value)) return 0x7fff;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  };
  return round(low) | round(high) << 16;
}

// From the register layout that the PTX manual gives for mma.m16n8k16. The sum is cut off, not rounded: tensor cores
// keep a few bits more than a float and drop the rest.
inline void multiply_add(float (&sum)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const auto all = emulation::gather(Operands{{a.x, a.z, a.y, a.w}, {b0, b1}});
  const int lane = thread_id() % 32;
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    double total = sum[i];
    for (int k = 0; k < 16; k++) {
      const Operands &left = all[row % 8 * 4 + k % 8 / 2], &right = all[column * 4 + k % 8 / 2];
      total += double(emulation::bf16(left.a[row / 8 + k / 8 * 2], k % 2)) * emulation::bf16(right.b[k / 8], k % 2);
    }
    const float nearest = float(total);
    sum[i] = std::fabs(double(nearest)) > std::fabs(total) ? std::nextafter(nearest, 0.0f) : nearest;
  }
}

}  // namespace aar::cuda
