// Multi-scale residual quantization over plain buffers: no framework, no Python.
//
// A quantizer is S levels over one residual r[T][D] of an item. Level s pools r to lengths[s] rows (area), finds the
// nearest code of each, and subtracts what the codes stand for: their rows interpolated to T (linear) and convolved by
// phi(u) = (u + conv(u)) / 2. Both are linear, so a code acts through `taps` rows, one for each tap of phi, folded
// with the identity: h[t] = bias + sum over taps of interpolate(row[tap])(t + tap - taps / 2). Without phi taps is 1
// and the row is the code itself.
//
// Factorised quantizers project the residual to a few channels, search there, and project the code back. Projections are
// linear, so the residual is kept projected: r has `dim` channels for each level, the level searches its own, and the
// row of a code is what it takes from the channels of the levels behind it.
#pragma once
#include <cstdint>

#include "aar/isa.h"
#include "aar/thread_pool.h"

namespace aar {

struct Shape {
  int64_t scales = 0, books = 0, codes = 0, dim = 0;  // books is scales, or 1 for a codebook that all levels share
  const int64_t* lengths = nullptr;                   // [scales]
  bool cosine = false;
  int64_t channels = 0;  // of the residual: books * dim where each level has channels of its own; 0: dim
  bool repeat = false;   // codes act on the frames they were pooled from, lengths[s] dividing T; not interpolated
  // [scales], or null: scale s is a grid of lengths[s] / widths[s] by widths[s] cells, row by row, and T is the last one's.
  // Pooling is over both axes, the interpolation bicubic, and phi square: its `taps` stand row by row.
  const int64_t* widths = nullptr;
};

// Codebooks in the form the search reads. A code is screened by an exact integer dot product of roundings to 8 bits, or
// to 16 where these do not tell enough; the few codes that rounding cannot tell apart are compared in double. Numbers
// of elements: `packed_sizes`. Each instruction set reads what it has packed itself.
struct Packed {
  int16_t* codes;  // [books][codes / 32][dim / 2][32][2], padded with zeros
  float* scale;    // [books][codes padded to 32]: value of one unit of a code's integers
  float* bias;     // [books][codes padded to 32]: |e|^2 / 2 (0 for cosine), +inf for padding
  float* exact;    // [books][codes][dim]: e normalised, compared in double; null for euclidean, which compares e itself
  float* bound;    // [books][kBounds]: largest |e|, |e - rounded e|, bias; then of the bytes: unit (0: do not use them)
                   // and what bounds their errors; least |e|
  uint8_t* bytes;  // [books][codes / 32][groups of channels][32][channels of a group]: e in 8 bits, plus 128; or null
  int16_t* byte_bias;  // [books][codes padded to 32]: bias, the largest being 32767; or null
};
constexpr int64_t kBounds = 10;
// Channels of a code in bytes, with padding.
inline int64_t byte_width(int64_t dim) { return (dim + 3) / 4 * 4; }
// Few codes are screened faster than a row is rounded twice, and with many channels bytes leave too many candidates.
inline bool bytes_pay(const Shape& shape) { return shape.codes >= 256 && shape.dim >= 4 && shape.dim <= 256; }
struct PackedSizes {
  int64_t codes, scale, exact, bound, bytes, byte_bias;  // as many of `bias` as of `scale`
};
inline PackedSizes packed_sizes(const Shape& shape) {
  const int64_t size = (shape.codes + 31) / 32 * 32;
  return {shape.books * size * 2 * ((shape.dim + 1) / 2), shape.books * size,
          shape.cosine ? shape.books * shape.codes * shape.dim : 0, shape.books * kBounds,
          bytes_pay(shape) ? shape.books * size * byte_width(shape.dim) : 0, bytes_pay(shape) ? shape.books * size : 0};
}

// How codes act on the residual. Either a table with the rows of every code, or, where codes are too many for a table, the
// folded weights from which the rows of the codes in use are computed.
struct Action {
  int64_t taps = 1;
  const float* codebooks = nullptr;  // [books][codes][dim]
  const float* table = nullptr;      // [tables][codes][taps][channels], or null
  const int64_t* table_of = nullptr; // [scales]
  const float* folded = nullptr;     // [kernels][dim in][taps][dim out], read where table is null
  const float* bias = nullptr;       // [kernels][dim], or null without phi
  const int64_t* kernel_of = nullptr;  // [scales]
  int64_t kernels = 0;
};

// The convolutions of phi as they are trained, all of them odd and at most `taps` wide.
struct Phi {
  int64_t kernels = 0, taps = 1;
  const float* const* weights = nullptr;  // [kernels] to [dim out][dim in][widths[kernel]]
  const float* const* biases = nullptr;   // [kernels] to [dim]
  const int64_t* widths = nullptr;
  const int64_t* kernel_of = nullptr;  // [scales]
};

// Results of the training forward. Gradients and statistics may be null.
struct Training {
  int64_t* codes;       // [batch][sum of lengths]
  float* quantized;     // [batch][T][dim]
  double* loss;         // [batch]: sum of squared residuals over scales, frames and channels
  float* residual_sum;  // [batch][T][dim]: sum over scales of the residual after the scale
  // Gradients of -factor times the sum of `loss`, as far as h - r is concerned: [kernels][dim out][dim in][taps], [kernels][dim]
  float *weight_grad, *bias_grad;
  float factor;
  // hits[books][codes] and sums[books][codes][dim] of the searched rows; sampled[books][codes][dim] are the rows that
  // samples[books][codes] name (of scale 0 if the codebook is shared), zeros for a row without a code.
  float *hits, *sums, *sampled;
  const int64_t* samples;
};

// Moving averages of the codebooks: decay, Laplace smoothing, and the average hits below which a code is replaced.
struct Averages {
  float decay, epsilon, dead_code_threshold;
};

// Everything that is compiled once per instruction set.
struct MsrqKernels {
  void (*pack)(const Shape&, const float* codebooks, const Packed&, const ThreadPool&);
  // table[codes][taps][dim] from one codebook and one folded kernel
  void (*build_table)(const float* codebook, const float* folded, int64_t codes, int64_t dim, int64_t taps,
                      float* table, const ThreadPool&);
  // x[batch][T][channels], mask[batch][T] or null -> out[batch][sum of lengths]. `rest`, where given, receives what the
  // levels leave of x.
  void (*encode)(const Shape&, const Packed&, const Action&, const float* x, const uint8_t* mask, int64_t batch,
                 int64_t length, int64_t* out, float* rest, const ThreadPool&);
  // codes[batch][tokens of scales first..last) -> adds to f_hat[batch][length][dim]; after each scale, where given,
  // copies to scales_out[scale - first][batch][length][dim] and pools to next_out[batch][next_stride / dim][dim].
  // Returns false, having written nothing, where a code is outside [-1, codes).
  bool (*decode)(const Shape&, const Action&, const int64_t* codes, int64_t batch, int64_t length, int64_t first,
                 int64_t last, float* f_hat, float* scales_out, float* next_out, int64_t next_stride,
                 const ThreadPool&);
  // The training forward of x[batch][T][dim], batch > 0. Codebooks and phi change at each step, so nothing is packed ahead.
  void (*quantize)(const Shape&, const float* codebooks, const Phi&, const float* x, const uint8_t* mask, int64_t batch,
                   int64_t length, const Training&, const ThreadPool&);
  // One step of the moving averages: in place on the three buffers of [books][codes](...). sampled may be null.
  void (*update)(const Shape&, const Averages&, float* codebooks, float* cluster_size, float* embed_avg,
                 const float* hits, const float* sums, const float* sampled, const ThreadPool&);
  // A 1x1 convolution: x[batch][channels][length] -> out[batch][outputs][length]. weight[outputs][channels]. A frame's
  // result does not depend on the frames beside it.
  void (*project)(const float* x, int64_t batch, int64_t channels, int64_t length, const float* weight,
                  const float* bias, int64_t outputs, float* out, const ThreadPool&);
  // codes[batch][sum of lengths] -> out[batch][scales * dim][length]: for each frame the rows of its codes, repeated
  // where a level is shorter. Returns false where a code is outside [-1, codes).
  bool (*gather)(const Shape&, const float* codebooks, const int64_t* codes, int64_t batch, int64_t length, float* out,
                 const ThreadPool&);
};

AAR_LEVELS(MsrqKernels, msrq_kernels)

}  // namespace aar
