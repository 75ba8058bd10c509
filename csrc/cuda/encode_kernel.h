// Encoding in one launch. A cluster of blocks takes a group of items through all scales: each block keeps the residual
// of a share of the frames, in shared memory that the others can read, and searches a share of the codebook.
//
// Per scale, and per chunk of rows where they do not all fit:
//   pool      each block pools a share of the rows and hands them to all blocks          | cluster barrier
//   search    each block finds the nearest of its codes, and hands cost and code to all  | cluster barrier
//   choose    the smallest cost, the first code among equals
//   act       each block takes what the codes stand for from its frames' residual        | cluster barrier
// Clusters share nothing, so a grid of any size goes through a batch of any size.
#pragma once
#include "resample.h"
#include "search.h"

namespace aar::cuda {

constexpr int kActFrames = 128;  // whose positions are worked out at once

// A block's shared memory, but for residual and codes, which come last and may lie elsewhere.
struct Memory {
  Search search;
  Position* positions;  // [kActFrames + taps - 1]
  int* broken;          // [group]: whether an item has a NaN or an Inf in it
  float* residual;      // [group][frames][width]
  int* codes;           // [group * longest], of the present scale
};

AAR_BOTH void carve_residual(Memory& memory, Carver& carver, const EncodePlan& plan, int width) {
  memory.residual = carver.take<float>(int64_t(plan.group) * plan.frames * width);
  memory.codes = carver.take<int>(int64_t(plan.group) * plan.longest);
}

AAR_BOTH Memory carve(Carver& carver, const EncodePlan& plan, int width, int taps) {
  Memory memory;
  Search& search = memory.search;
  search.rows = carver.take<float>(kChunk * width);
  search.fragments = carver.take<uint4>(kChunk * width / 8);
  search.candidates = carver.take<uint2>(kCandidates);
  search.survivors = carver.take<uint32_t>(kCandidates);
  search.tolerance = carver.take<float>(kChunk);
  search.best = carver.take<int>(kChunk);
  search.crowded = carver.take<int>(kChunk);
  search.counts = carver.take<int>(3);
  search.least = carver.take<unsigned long long>(plan.cluster * kChunk);
  search.winner = carver.take<int>(plan.cluster * kChunk);
  memory.positions = carver.take<Position>(kActFrames + taps - 1);
  memory.broken = carver.take<int>(plan.group);
  if (plan.workspace == 0) carve_residual(memory, carver, plan, width);
  return memory;
}

template <int WIDTH>
class Encoder {
 public:
  AAR_DEVICE Encoder(const Encode& call, const EncodePlan& plan)
      : call_(call), plan_(plan), rank_(cluster_rank()), cluster_(block_id() / plan.cluster) {
    Carver carver{shared_memory()};
    memory_ = carve(carver, plan, WIDTH, call.tables.taps);
    if (plan.workspace != 0) {
      Carver spilled{reinterpret_cast<unsigned char*>(call.workspace) + block_id() * workspace_share(plan)};
      carve_residual(memory_, spilled, plan, WIDTH);
    }
  }

  AAR_DEVICE void run() {
    for (int first = cluster_ * plan_.group; first < call_.batch; first += plan_.clusters * plan_.group) {
      first_ = first;
      items_ = call_.batch - first < plan_.group ? call_.batch - first : plan_.group;
      start();
      for (int s = 0; s < call_.scales; s++) {
        const Scale& scale = call_.scale[s];
        const Book book = book_of(call_, scale, WIDTH);
        for (int row = 0; row < items_ * scale.length; row += plan_.chunk) find(scale, book, row);
        // After the last exchange of codes no block reads another's memory: it may go on to other items, or end.
        if (s + 1 < call_.scales) act(scale);
      }
    }
  }

 private:
  static constexpr int kLanes = WIDTH / 4;             // threads that share a row, four channels each
  static constexpr int kRowsAtOnce = kThreads / kLanes;

  AAR_DEVICE static size_t workspace_share(const EncodePlan& plan) {
    return plan.workspace / (size_t(plan.clusters) * plan.cluster);
  }
  AAR_DEVICE int own_frames() const {
    const int first = rank_ * plan_.frames, left = call_.length - first;
    return left < 0 ? 0 : left < plan_.frames ? left : plan_.frames;
  }
  AAR_DEVICE bool is_masked(int item, int t) const {
    return call_.mask != nullptr && !load_constant(call_.mask + int64_t(first_ + item) * call_.length + t);
  }
  AAR_DEVICE float4* residual_of(int rank, int item, int frame) const {
    float* residual = memory_.residual;
    if (plan_.workspace == 0) residual = at_rank(residual, rank);
    else residual += (rank - rank_) * int64_t(workspace_share(plan_) / sizeof(float));
    return reinterpret_cast<float4*>(residual + (item * plan_.frames + frame) * WIDTH) + thread_id() % kLanes;
  }

  AAR_DEVICE void start() {
    for (int i = fresh_thread_id(); i < items_; i += kThreads) memory_.broken[i] = 0;
    sync_cluster();
    const int frames = own_frames();
#pragma unroll 1
    for (int i = fresh_thread_id() / kLanes; i < items_ * frames; i += kRowsAtOnce) {
      const int item = i / frames, t = rank_ * plan_.frames + i % frames;
      float4 value = {0, 0, 0, 0};
      if (!is_masked(item, t)) {
        const float* x = call_.x + (int64_t(first_ + item) * call_.length + t) * call_.tables.dim;
        value = load_channels(x, fresh_thread_id() % kLanes * 4, call_.tables.dim);
      }
      // A difference with itself is 0, or NaN for NaN and Inf.
      const float4 rest = {value.x - value.x, value.y - value.y, value.z - value.z, value.w - value.w};
      if (!(rest.x + rest.y + rest.z + rest.w == 0))
#pragma unroll 1
        for (int rank = 0; rank < plan_.cluster; rank++) atomic_or(at_rank(memory_.broken, rank) + item, 1);
      *residual_of(rank_, item, i % frames) = value;
    }
    sync_cluster();
  }

  // Codes of rows [row, row + chunk) of the group: row i * length + j is token j of item i.
  AAR_DEVICE void find(const Scale& scale, const Book& book, int row) {
    const Search& search = memory_.search;
    const int all = items_ * scale.length, rows = all - row < plan_.chunk ? all - row : plan_.chunk;
    const int own = rank_ * kChunk;
#pragma unroll 1
    for (int i = thread_id(); i < rows; i += kThreads) {
      search.best[i] = ordered(-INFINITY);
      search.crowded[i] = 0;
      search.least[own + i] = ~0ull;
      search.winner[own + i] = kNoCode;
    }
    if (thread_id() < 3) search.counts[thread_id()] = 0;
    Tile<WIDTH> tile;
    load_first_tile(tile, book);
    pool(scale, book, row, rows);
    sync_cluster();

    screen(search, book, tile, rows);
    sync_block();
    settle<WIDTH>(search, book, rows);
#pragma unroll 1
    for (int i = thread_id(); i < rows * plan_.cluster; i += kThreads) {
      const int rank = i / rows, slot = own + i % rows;
      const bool empty = search.tolerance[i % rows] == kEmptyRow;
      if (rank == rank_ && !empty) continue;
      at_rank(search.least, rank)[slot] = empty ? 0 : search.least[slot];
      at_rank(search.winner, rank)[slot] = empty ? -1 : search.winner[slot];
    }
    sync_cluster();

    choose(scale, row, rows);
  }

  AAR_DEVICE void pool(const Scale& scale, const Book& book, int row, int rows) {
    const int begin = rows * rank_ / plan_.cluster, end = rows * (rank_ + 1) / plan_.cluster;
    // All lanes of a warp go round alike, since they shuffle; those without a row do so for nothing.
    for (int base = begin; base < end; base += kRowsAtOnce) {
      const int i = base + thread_id() / kLanes;
      float4 mean = {0, 0, 0, 0};
      const int seen = i < end ? pool_row(scale, row + i, mean) : 0;
      const uint32_t low = round_pair(mean.x, mean.y), high = round_pair(mean.z, mean.w);
      const float4 rounded = {as_float(int(low << 16)), as_float(int(low & 0xffff0000u)), as_float(int(high << 16)),
                              as_float(int(high & 0xffff0000u))};
      float norm2 = squares(rounded), error2 = squares(add_scaled(mean, rounded, -1.0f));
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        norm2 += shuffle_xor(norm2, distance);
        error2 += shuffle_xor(error2, distance);
      }
      if (i >= end) continue;
      const float tolerance = seen == 0 ? kEmptyRow : tolerance_of(norm2, error2, book.bound);
      const int channel = thread_id() % kLanes * 4;
#pragma unroll 1
      for (int rank = 0; rank < plan_.cluster; rank++) {
        *reinterpret_cast<float4*>(at_rank(memory_.search.rows, rank) + i * WIDTH + channel) = mean;
        store_fragment(at_rank(memory_.search.fragments, rank), i, channel, WIDTH, low, high);
        if (channel == 0) at_rank(memory_.search.tolerance, rank)[i] = tolerance;
      }
    }
  }

  // The mean of a token's window, and how many frames it is of: none for a broken item.
  AAR_DEVICE int pool_row(const Scale& scale, int row, float4& mean) const {
    const int item = row / scale.length, token = row % scale.length;
    if (memory_.broken[item]) return 0;
    const int begin = window_begin(token, scale.length, call_.length);
    const int end = window_end(token, scale.length, call_.length);
    int seen = 0, rank = begin / plan_.frames, frame = begin % plan_.frames;
#pragma unroll 8
    for (int t = begin; t < end; t++) {
      mean = add(mean, *residual_of(rank, item, frame));
      seen += !is_masked(item, t);
      if (++frame == plan_.frames) frame = 0, rank++;
    }
    if (seen > 1) mean = divide(mean, float(seen));
    return seen;
  }
  AAR_DEVICE static float squares(const float4& v) {
    return fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, v.w * v.w)));
  }

  // Reads what the blocks exchanged, and nothing else of the search: other blocks may already pool the next rows.
  AAR_DEVICE void choose(const Scale& scale, int row, int rows) {
    const Search& search = memory_.search;
#pragma unroll 1
    for (int i = thread_id(); i < rows; i += kThreads) {
      unsigned long long least = search.least[i];
      int code = search.winner[i];
#pragma unroll 5
      for (int rank = 1; rank < plan_.cluster; rank++) {
        const unsigned long long cost = search.least[rank * kChunk + i];
        const int winner = search.winner[rank * kChunk + i];
        if (cost < least || (cost == least && winner < code)) least = cost, code = winner;
      }
      if (code == kNoCode) code = 0;  // only a codebook with NaN in it leaves no candidate
      memory_.codes[row + i] = code;
      const int item = (row + i) / scale.length, token = (row + i) % scale.length;
      if (i % plan_.cluster == rank_) call_.out[int64_t(first_ + item) * call_.tokens + scale.offset + token] = code;
    }
  }

  AAR_DEVICE void act(const Scale& scale) {
    const int own = own_frames(), half = call_.tables.taps / 2;
    for (int from = 0; from < own; from += kActFrames) {
      const int frames = own - from < kActFrames ? own - from : kActFrames;
      const int first = rank_ * plan_.frames + from - half;
#pragma unroll 1
      for (int i = fresh_thread_id(); i < frames + 2 * half; i += kThreads)
        if (first + i >= 0 && first + i < call_.length)
          memory_.positions[i] = position_of(first + i, scale.length, call_.length);
      sync_block();  // also for the codes
#pragma unroll 1
      for (int i = fresh_thread_id() / kLanes; i < items_ * frames; i += kRowsAtOnce) {
        const int item = i / frames, t = first + half + i % frames;
        if (is_masked(item, t)) continue;
        const int* codes = memory_.codes + item * scale.length;
        const float4 h = contribution<5>(call_.tables, scale, codes, memory_.positions, first, t, call_.length,
                                      fresh_thread_id() % kLanes * 4);
        float4* residual = residual_of(rank_, item, from + i % frames);
        *residual = add_scaled(*residual, h, -1.0f);
      }
      if (from + kActFrames < own) sync_block();
    }
    sync_cluster();
  }

  const Encode& call_;
  const EncodePlan& plan_;
  const int rank_, cluster_;
  int first_, items_;  // of the present group
  Memory memory_;
};

template <int WIDTH, int BLOCKS>
AAR_KERNEL(kThreads, BLOCKS) encode_kernel(AAR_ARGUMENTS(Encode) call, AAR_ARGUMENTS(EncodePlan) plan) {
  Encoder<WIDTH>(call, plan).run();
}

}  // namespace aar::cuda
