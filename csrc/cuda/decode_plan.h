// How decode lays a batch out on a device.
#pragma once
#include "decode_kernel.h"

namespace aar::cuda {

inline DecodePlan plan_for(const Decode& call) {
  constexpr int kMostForSums = 64 << 10;  // bytes: three blocks of a multiprocessor have as much
  const bool pools = call.next_out != nullptr;
  DecodePlan plan = {};
  plan.slices = (call.tables.dim + kSlice - 1) / kSlice;
  plan.frames = pools ? call.length : kFramesAtOnce;
  plan.parts = (call.length + plan.frames - 1) / plan.frames;
  for (int s = call.first; s < call.last; s++)
    if (call.scale[s].length > plan.longest) plan.longest = call.scale[s].length;
  plan.sums_fit = plan.frames * kSlice * int(sizeof(float)) <= kMostForSums;
  Carver carver{nullptr};
  carver.take<int>(plan.longest);
  carver.take<Position>(kFramesAtOnce + call.tables.taps - 1);
  if (plan.sums_fit) carver.take<float4>(plan.frames * kSliceLanes);
  plan.shared = int(reinterpret_cast<intptr_t>(carver.at));
  return plan;
}

}  // namespace aar::cuda
