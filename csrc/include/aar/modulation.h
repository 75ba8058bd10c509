// Adaptive layer normalisation, the gated residual before it, and the gradients of both.
#pragma once
#include <cstdint>

#include "aar/element.h"
#include "aar/isa.h"
#include "aar/thread_pool.h"

namespace aar {

struct ModulationShape {
  int64_t batch, tokens, channels;
};

// Rows of `channels` numbers side by side: [batch][tokens], or [batch] for what an item has one of. `stride` elements
// lie between the beginnings of two rows. Optional rows have no data.
struct Rows {
  void* data = nullptr;
  Element element = Element::float32;
  int64_t stride = 0;
};

// statistics[batch][tokens][2]: mean and reciprocal standard deviation of each normalised row.
struct ModulationForward {
  Rows x, y, gate, scale, shift;  // y and gate, and with them x_new, may be without data
  float eps;
  Rows x_new, modulated;
  float* statistics;
};

struct ModulationBackward {
  Rows grad_x_new, grad_modulated;  // the first may be without data, which means zero
  Rows x, y, gate, scale;           // x is what was normalised; y, gate and grad_y may be without data
  const float* statistics;
  Rows grad_x, grad_y;
  float* sums;  // [2 or, with a gate, 3][batch][channels]: gradients of scale, shift and gate
};

// Everything that is compiled once per instruction set.
struct ModulationKernels {
  void (*forward)(const ModulationShape&, const ModulationForward&, const ThreadPool&);
  void (*backward)(const ModulationShape&, const ModulationBackward&, const ThreadPool&);
};

AAR_LEVELS(ModulationKernels, modulation_kernels)

}  // namespace aar
