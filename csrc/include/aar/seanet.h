// Convolution stacks of SEANet and the LSTM between them, over plain buffers: no framework, no Python.
//
// Signals lie channels last, [time][channels], so that the window of a convolution is one run of kernel * channels
// floats, and a convolution is a matrix product over such runs. Products are stored in panels of 16 output channels,
// [N / 16, rounded up][K + 1][16], zeros behind N; row K is the bias. They hold fp32 or bf16, which is
// widened to fp32 as it is read; all else is fp32. The layout is the same for every instruction set.
// Sums are fused multiply-adds in a fixed order: results depend neither on the block size nor on the number of threads.
#pragma once
#include <algorithm>
#include <cstdint>

#include "aar/element.h"
#include "aar/isa.h"
#include "aar/thread_pool.h"

namespace aar {

constexpr int64_t kSeanetPanel = 16;
constexpr int64_t kSeanetPairedWidth = 64;  // of a tap's input and of the output, from which computing pairs pays

enum class SeanetKind { conv, transposed, residual };
// What a layer adds to its input: on both sides, before it, or nothing, where the input begins with what came before.
// symmetric: as much on the right as on the left, and nothing for the last stride.
enum class SeanetPadding { centered, causal, none, symmetric };
// Of the input; snake: x + sin(alpha x)^2 / (alpha + 1e-9), alpha of each channel.
enum class SeanetActivation { identity, elu, snake };

// A layer of a stack. conv: K is kernel * in, tap by tap, N is out. transposed: a convolution of `taps` taps that gives
// stride * out channels, which are `stride` steps of the output. residual: [ELU, conv, ELU, 1x1 conv] + shortcut, or
// with Snake for ELU, the second product over `hidden` channels and, where the shortcut is a 1x1 convolution, the
// input's behind them.
struct SeanetLayer {
  SeanetKind kind;
  int64_t in, hidden, out, kernel, stride, dilation;
  SeanetPadding padding;
  bool reflect;          // the signal reflected, or zeros
  SeanetActivation activation;
  bool shortcut;         // of a residual: a convolution, or the identity
  const void *first = nullptr, *second = nullptr;
  const void *alpha = nullptr, *hidden_alpha = nullptr;  // of Snake: of the input, and of a residual's hidden channels

  int64_t taps() const { return kind == SeanetKind::transposed ? (kernel + stride - 1) / stride : kernel; }
  // Where two steps of the product are computed together, by fewer multiplications: floats that a tap reads; else 0.
  int64_t tap() const {
    const int64_t width = kind == SeanetKind::transposed ? in : stride * in, least = kSeanetPairedWidth;
    const bool divides = dilation == 1 && first_K() % width == 0 && first_K() > width && first_N() % kSeanetPanel == 0;
    return kind != SeanetKind::residual && divides && width >= least && first_N() >= least ? width : 0;
  }
  int64_t first_K() const { return taps() * in; }
  int64_t first_N() const {
    return kind == SeanetKind::residual ? hidden : kind == SeanetKind::transposed ? stride * out : out;
  }
  int64_t second_K() const { return hidden + (shortcut ? in : 0); }
  static int64_t size(int64_t K, int64_t N) { return (N + kSeanetPanel - 1) / kSeanetPanel * (K + 1) * kSeanetPanel; }
  int64_t first_size() const { return size(first_K(), first_N()); }
  int64_t second_size() const { return kind == SeanetKind::residual ? size(second_K(), out) : 0; }
  int64_t alphas(int64_t channels) const {
    return activation == SeanetActivation::snake ? (channels + kSeanetPanel - 1) / kSeanetPanel * kSeanetPanel : 0;
  }
  int64_t alpha_size() const { return alphas(in); }
  int64_t hidden_alpha_size() const { return kind == SeanetKind::residual ? alphas(hidden) : 0; }
  // Steps of input that a step of the first product reads.
  int64_t span() const { return kind == SeanetKind::transposed ? taps() : (kernel - 1) * dilation + 1; }
  // Steps of input before a stride that its outputs depend on, where the layer is causal.
  int64_t context() const { return span() - (kind == SeanetKind::transposed ? 1 : stride); }
  // Steps of a causal layer's input that its outputs after a chunk depend on: those, or what the signal's end mirrors.
  int64_t kept() const { return std::max(context(), reflect && kind != SeanetKind::transposed ? stride - 1 : 0); }
  // Steps of output for `length` of input; below 1 for too few.
  int64_t length(int64_t length) const {
    if (padding == SeanetPadding::none) length -= context();
    const bool symmetric = padding == SeanetPadding::symmetric;
    if (kind == SeanetKind::transposed) return length * stride - (symmetric ? (kernel - stride) % 2 : 0);
    if (symmetric) return (length + context() % 2) / stride;
    return padding == SeanetPadding::none ? length / stride : (length + stride - 1) / stride;
  }
};

// A piece of a signal, from step `position` on; with `last` the signal ends with it. state[batch] is what comes from
// the piece before, and then what goes to the next: of each layer in turn the last kept() steps of its input, as its
// product reads them (after ELU, if that is no residual). At position 0 it is only written. Null for a whole signal.
struct SeanetChunk {
  float* state;
  int64_t position;
  bool last;
};

// Weights of one LSTM layer as products: `input` is [in -> 4 units], `recurrent` [units -> 4 units] with a bias of
// zeros. Columns are in groups of 64: gates i, f, g, o of 16 units each; the last group's units are padded with zeros.
struct LstmLayer {
  const void *input, *recurrent;
};

struct SeanetKernels {
  // x[batch][length][in of the first layer] -> out[batch][...][out of the last]. `block` is how many steps of output a
  // layer's product computes before the next layer takes them; 0: as many as suit the caches. Each layer of a chunk
  // is causal, and begins, and but for the last chunk ends, with whole strides.
  void (*stack)(const SeanetLayer* layers, int64_t count, Element weights, const float* x, int64_t batch,
                int64_t length, int64_t block, float* out, const SeanetChunk&, const ThreadPool&);
  // From x[batch][length][in] of one layer, which is centered or causal, has no Snake and fp32 weights, and dy of the
  // size of its output: dx of the size of x, unless it is null, and the gradient of the weights, as they are packed;
  // that of what fills up panels is of no use.
  void (*backward)(const SeanetLayer& layer, const float* x, const float* dy, int64_t batch, int64_t length, float* dx,
                   float* gradient, const ThreadPool&);
  // x[batch][length][units] -> out the same, x + LSTM(x) where `skip`. before and after[count][h, c][batch][units] are
  // the states around the steps; null before the first means zeros.
  void (*lstm)(const LstmLayer* layers, int64_t count, Element weights, const float* x, int64_t batch, int64_t length,
               int64_t units, bool skip, const float* before, float* out, float* after, const ThreadPool&);
  // x[batch][length][channels], in place: mean 0 and variance 1 of each item, by scale[channels] and shift[channels],
  // plus add, of x's size, unless it is null.
  void (*norm)(float* x, int64_t batch, int64_t length, int64_t channels, const float* scale, const float* shift,
               float eps, const float* add, const ThreadPool&);
};

AAR_LEVELS(SeanetKernels, seanet_kernels)

}  // namespace aar
