// Block-causal scale attention: a token sees its own scale and all earlier ones.
#pragma once
#include <cstdint>

#include "element.h"
#include "isa.h"
#include "thread_pool.h"

namespace aar {

// [batch][token][head][dim] in place, whatever it is a view of: strides in elements, channels side by side.
struct Heads {
  void* data;
  int64_t batch, token, head;
};

struct AttentionShape {
  Element element;  // of every Heads; sums are in fp32
  int64_t batch, tokens, heads, dim;
  float softmax_scale;
  // [heads] or null. With it q and k are L2-normalised, and logits are multiplied by exp(min(s, ln 100)).
  const float* head_log_scale;
};

// Everything that is compiled once per instruction set. lengths[scales] are the tokens of each scale; their sum is
// shape.tokens. lse[batch][heads][tokens]: logarithm of the sum of the exponentials of a row's logits.
struct AttentionKernels {
  void (*forward)(const AttentionShape&, const int64_t* lengths, const Heads& q, const Heads& k, const Heads& v,
                  const Heads& out, float* lse, const ThreadPool&);
  // grad_scale[heads]: by head_log_scale; null where there is none.
  void (*backward)(const AttentionShape&, const int64_t* lengths, const Heads& grad, const Heads& q, const Heads& k,
                   const Heads& v, const float* lse, const Heads& grad_q, const Heads& grad_k, const Heads& grad_v,
                   float* grad_scale, const ThreadPool&);
  // Attention of shape.tokens tokens to each other and to the `start` tokens of the caches, to which it adds them.
  void (*step)(const AttentionShape&, int64_t start, const Heads& q, const Heads& k, const Heads& v,
               const Heads& cache_k, const Heads& cache_v, const Heads& out, const ThreadPool&);
};

AAR_LEVELS(AttentionKernels, attention_kernels)

}  // namespace aar
