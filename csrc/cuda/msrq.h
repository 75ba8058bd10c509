// Multi-scale residual quantization on a GPU: what each call takes, and the launchers. See aar/msrq.h for the
// mathematics. All pointers are device memory; nothing waits for the device.
#pragma once
#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace aar::cuda {

constexpr int kMaxScales = 128;   // they travel in the kernel's arguments
constexpr int kMaxDim = 128;
constexpr int kTileCodes = 32;    // codes that a warp screens at once; packed codebooks are padded to whole tiles

struct Scale {
  int length, offset;       // tokens of the scale, and before it
  int book, table, kernel;  // indices of its codebook, its table and its phi kernel
};

// How codes act on the sequence.
struct Tables {
  const float* rows;  // [tables][codes][taps][dim]; the codebooks themselves without phi, and taps 1
  const float* bias;  // [kernels][dim], or null without phi
  int codes, taps, dim;
};

// Codebooks as the search reads them: `pack` of aar_kernels/quantization/native_cuda.py.
struct Packed {
  const void* fragments;      // [books][codes / 8][width / 32][32 lanes] of 16 bytes: bf16 operands of the tensor core
  const float* half_squares;  // [books][padded codes]: |e|^2 / 2 (0 for cosine), +inf for padding
  const float* exact;         // [books][codes][width]: what is compared in double; normalised for cosine
  const float* bound;         // [books][3]: largest |e|, |e - bf16(e)|, |e|^2 / 2, each rounded up
};

struct Encode {
  const float* x;       // [batch][length][dim]
  const uint8_t* mask;  // [batch][length], or null
  int64_t* out;         // [batch][tokens]
  float* workspace;     // `EncodePlan::workspace` bytes, or null where that is 0
  Packed packed;
  Tables tables;
  int batch, length, tokens, scales, padded_codes;
  bool cosine;
  Scale scale[kMaxScales];
};

// How a batch is laid out on the device.
struct EncodePlan {
  int cluster;       // blocks that share an item
  int group;         // items that a cluster takes at once
  int frames;        // of each item, that a block keeps the residual of
  int longest;       // tokens of the longest scale
  int chunk;         // rows searched at once: a multiple of 16, at most kChunk
  int clusters;      // in the grid; each goes on to further groups of items
  int shared;        // bytes of shared memory per block
  size_t workspace;  // bytes of device memory for residuals and codes that do not fit in shared memory; usually 0
};

struct Decode {
  const int64_t* codes;  // [batch][tokens of scales first..last)
  const float* base;     // [batch][length][dim] to begin with, or null for zeros
  float* f_hat;          // [batch][length][dim]: the sum
  float* scales_out;     // [last - first][batch][length][dim]: the sum after each scale, or null
  float* next_out;       // [batch][next_rows][dim]: after each scale, pooled to the length of the next; or null
  Tables tables;
  int batch, length, tokens, first, last, scales, next_rows;
  Scale scale[kMaxScales];
};

// The width to which packed codes are padded with zeros.
constexpr int padded_dim(int dim) { return dim <= 32 ? 32 : dim <= 64 ? 64 : 128; }

// These return 0 or a cudaError_t.
int plan_encode(const Encode& call, EncodePlan* plan);
int encode(const Encode& call, const EncodePlan& plan, CUstream_st* stream);
int decode(const Decode& call, CUstream_st* stream);
const char* error_text(int error);

}  // namespace aar::cuda
