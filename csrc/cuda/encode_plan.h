// How encode lays a batch out on a device. Plain C++, so that tests can ask about devices that are not there.
#pragma once
#include "encode_kernel.h"

namespace aar::cuda {

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Fills in sizes of memory; returns whether a block's shared memory fits.
inline bool fit(EncodePlan& plan, int width, int taps, int shared, bool spill) {
  plan.workspace = spill ? 1 : 0;
  Carver carver{nullptr}, spilled{nullptr};
  Memory memory = carve(carver, plan, width, taps);
  plan.shared = int(reinterpret_cast<intptr_t>(carver.at));
  if (spill) {
    carve_residual(memory, spilled, plan, width);
    plan.workspace = reinterpret_cast<size_t>(spilled.at) * plan.clusters * plan.cluster;
  }
  return plan.shared <= shared;
}

// A few items get a cluster each, as large as the device has room for: what they wait for is one another's latency.
// Many items get a block each; more than that share a block in groups, so that a codebook is read once per group.
//
// processors, shared: multiprocessors, and bytes of shared memory that a block may have. most: blocks per cluster at
// most. chunk: rows searched at once at most, up to kChunk.
inline EncodePlan plan_for(const Encode& call, int processors, int shared, int most, int chunk) {
  const int width = padded_dim(call.tables.dim), taps = call.tables.taps, batch = call.batch > 0 ? call.batch : 1;
  EncodePlan plan = {};
  for (int s = 0; s < call.scales; s++)
    if (call.scale[s].length > plan.longest) plan.longest = call.scale[s].length;
  for (plan.cluster = 1; plan.cluster * 2 <= most && batch * plan.cluster * 2 <= processors;) plan.cluster *= 2;
  plan.frames = ceil_div(call.length, plan.cluster);
  const int filled = batch / (2 * processors), useful = chunk / plan.longest < 2 ? 2 : chunk / plan.longest;
  plan.group = plan.cluster > 1 || filled < 1 ? 1 : filled < useful ? filled : useful;

  const auto two_fit = [&] { return width == 128 || 2 * (plan.shared + 1024) <= shared + 1024; };
  const auto settle = [&](int group, int rows, bool spill) {
    const int tokens = group * plan.longest;
    plan.group = group;
    plan.chunk = tokens < rows ? ceil_div(tokens, 16) * 16 : rows;
    const int groups = ceil_div(batch, group);
    const auto resident = [&](int blocks) { return ceil_div(processors * blocks, plan.cluster); };
    plan.clusters = groups;
    if (!fit(plan, width, taps, shared, spill)) return false;
    const int blocks = width < 128 && two_fit() ? 2 : 1;
    if (plan.clusters > resident(blocks)) plan.clusters = resident(blocks);
    return fit(plan, width, taps, shared, spill);
  };
  // Two blocks of a multiprocessor hide each other's latencies, so groups are no larger than leaves room for them.
  if (plan.group > 1 && settle(plan.group, chunk, false) && two_fit()) return plan;
  if (settle(1, chunk, false)) return plan;
  settle(1, chunk, true);
  return plan;
}

}  // namespace aar::cuda
