// The CUDA kernels on the host (csrc/cuda/emulate.h), with a C interface for test_cuda_model.py.
#define AAR_EMULATE
#include "decode_plan.h"
#include "encode_plan.h"

using namespace aar::cuda;

namespace {

// scales: [count][length, book, table, kernel].
template <class Call>
void set_scales(Call& call, const int* scales, int count) {
  int offset = 0;
  for (int s = 0; s < count; s++) {
    const int* fields = scales + 4 * s;
    call.scale[s] = {fields[0], offset, fields[1], fields[2], fields[3]};
    offset += fields[0];
  }
  call.scales = count;
}

}  // namespace

extern "C" {

// The plan of a batch on a device, in the order of EncodePlan's fields.
void model_plan(int batch, int length, int dim, int codes, int taps, const int* scales, int count, int processors,
                int shared, int most, int chunk, int64_t* out) {
  Encode call = {};
  set_scales(call, scales, count);
  call.batch = batch, call.length = length, call.tables = {nullptr, nullptr, codes, taps, dim};
  const EncodePlan plan = plan_for(call, processors, shared, most, chunk);
  const int64_t fields[] = {plan.cluster, plan.group,  plan.frames,           plan.longest, plan.chunk,
                            plan.clusters, plan.shared, int64_t(plan.workspace)};
  std::copy(std::begin(fields), std::end(fields), out);
}

// As `encode` on a device of so many multiprocessors with so much shared memory per block.
void model_encode(const float* x, const uint8_t* mask, const void* fragments, const float* half_squares,
                  const float* exact, const float* bound, const float* rows, const float* bias, const int* scales,
                  int count, int batch, int length, int dim, int codes, int taps, int cosine, int processors,
                  int shared, int most, int chunk, unsigned seed, int64_t* out) {
  Encode call = {};
  set_scales(call, scales, count);
  call.x = x, call.mask = mask, call.out = out;
  call.packed = {fragments, half_squares, exact, bound};
  call.tables = {rows, bias, codes, taps, dim};
  call.batch = batch, call.length = length, call.cosine = cosine;
  call.tokens = call.scale[count - 1].offset + call.scale[count - 1].length;
  call.padded_codes = ceil_div(codes, kTileCodes) * kTileCodes;
  const EncodePlan plan = plan_for(call, processors, shared, most, chunk);
  std::vector<float> workspace(plan.workspace / sizeof(float), NAN);
  call.workspace = workspace.data();
  const auto kernel = [&] {
    switch (padded_dim(dim)) {
      case 32: return encode_kernel<32, 2>(call, plan);
      case 64: return encode_kernel<64, 2>(call, plan);
      default: return encode_kernel<128, 1>(call, plan);
    }
  };
  emulation::launch(kernel, plan.clusters * plan.cluster, plan.cluster, kThreads, size_t(plan.shared), seed);
}

void model_decode(const int64_t* codes, const float* base, const float* rows, const float* bias, const int* scales,
                  int count, int batch, int length, int dim, int size, int taps, int first, int last, unsigned seed,
                  float* f_hat, float* scales_out, float* next_out) {
  Decode call = {};
  set_scales(call, scales, count);
  call.codes = codes, call.base = base, call.f_hat = f_hat, call.scales_out = scales_out, call.next_out = next_out;
  call.tables = {rows, bias, size, taps, dim};
  call.batch = batch, call.length = length, call.first = first, call.last = last;
  for (int s = first; s < last; s++) {
    call.tokens += call.scale[s].length;
    if (s + 1 < count) call.next_rows += call.scale[s + 1].length;
  }
  const DecodePlan plan = plan_for(call);
  const auto kernel = [&] { next_out != nullptr ? decode_kernel<true>(call, plan) : decode_kernel<false>(call, plan); };
  emulation::launch(kernel, batch * plan.slices * plan.parts, 1, kDecodeThreads, size_t(plan.shared), seed);
}
}
