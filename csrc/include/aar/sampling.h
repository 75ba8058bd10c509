// Sampling of codes over plain buffers: guidance, temperature, top-k, top-p and the draw, one pass per token.
//
// What is computed, and why every instruction set and number of threads draws the same codes, is in
// aar_kernels/sampling/common.py, whose constants stand here again.
#pragma once
#include <cstdint>

#include "aar/isa.h"
#include "aar/thread_pool.h"

namespace aar {

struct Sampling {
  float conditional, unconditional;  // guided = conditional * logits - unconditional * uncond
  float scale;                       // log2(e) / temperature; 0 takes the most probable code
  int64_t top_k;                     // 0 or all codes: off
  double top_p;                      // 1: off
  int64_t position;                  // index within its item of the first token
};

struct SamplingKernels {
  // logits[batch][tokens][vocabulary], uncond the same or null, seeds[batch] -> codes[batch][tokens].
  // Returns false where a token has a NaN or a +inf, or nothing but -inf.
  bool (*sample)(const Sampling&, const float* logits, const float* uncond, const int64_t* seeds, int64_t batch,
                 int64_t tokens, int64_t vocabulary, int64_t* codes, const ThreadPool&);
};

AAR_LEVELS(SamplingKernels, sampling_kernels)

}  // namespace aar
