// Blocks of a transformer with adaptive layer norm (DiT, VAR, AAR) for the tokens that come next: modulation, attention
// to a cache, and a feed-forward layer, each by the kernel of its own operator. What is fused is the call.
#pragma once
#include <cstdint>
#include <vector>

#include "aar/attention.h"
#include "aar/linear.h"
#include "aar/modulation.h"

namespace aar {

struct TransformerShape {
  int64_t batch, tokens, heads, dim;  // heads * dim channels
  int64_t start;                      // tokens that the caches hold already
  float softmax_scale, eps;
};

struct TransformerLayer {
  LinearWeight weight;
  const float* bias;  // [weight.N]
};

// shift, scale and gate have a row for each item.
struct TransformerBlock {
  TransformerLayer qkv, proj, fc1, fc2;
  const float* head_log_scale;  // [heads], or null
  Rows gate1, gate2, scale1, scale2, shift1, shift2;
  Heads cache_k, cache_v;
};

// x[batch][tokens][channels] -> out, the same: what the last layer norm makes of it, by the last scale and shift.
void transformer_step(const TransformerShape&, const std::vector<TransformerBlock>&, const Rows& scale,
                      const Rows& shift, const float* x, float* out, const ThreadPool&);

}  // namespace aar
