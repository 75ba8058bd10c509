// Multi-scale residual quantization on a GPU, on LibTorch's stable ABI.
#define USE_CUDA  // declares aoti_torch_get_current_cuda_stream
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/msrq.h"
#include "torch.h"

namespace {

namespace cuda = aar::cuda;

template <class T>
T* on_device(const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous() && tensor.scalar_type() == dtype,
                  "aar_native: expected a contiguous CUDA tensor of another dtype or device");
  return static_cast<T*>(tensor.data_ptr());
}
float* numbers(const Tensor& tensor) { return on_device<float>(tensor, ScalarType::Float); }
float* numbers(const MaybeTensor& tensor) { return tensor ? numbers(*tensor) : nullptr; }

CUstream_st* stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
                  "aar_native: no current CUDA stream");
  return static_cast<CUstream_st*>(stream);
}

void check(int error) { STD_TORCH_CHECK(error == 0, "aar_native: CUDA: ", cuda::error_text(error)); }

cuda::Tables tables_of(const Tensor& rows, const MaybeTensor& bias, int64_t codes, int64_t dim, int64_t taps) {
  STD_TORCH_CHECK(taps % 2 == 1 && codes > 0 && codes < 1 << 22 && dim > 0 && dim <= cuda::kMaxDim,
                  "aar_native: dim must be at most 128, codes fewer than 2^22");
  return {numbers(rows), numbers(bias), int(codes), int(taps), int(dim)};
}

// Fills in the scales; checks that no table, codebook or bias is outside what there is.
template <class Call>
void set_scales(Call& call, const Ints& lengths, int64_t books, const Tensor& rows, const MaybeTensor& bias,
                const Ints& table_of, const Ints& kernel_of) {
  const size_t scales = lengths.size();
  STD_TORCH_CHECK(scales > 0 && scales <= cuda::kMaxScales && table_of.size() == scales && kernel_of.size() == scales,
                  "aar_native: from 1 to 128 scales");
  STD_TORCH_CHECK(books == 1 || books == int64_t(scales), "aar_native: one codebook per scale, or one");
  const int64_t table = int64_t(call.tables.codes) * call.tables.taps * call.tables.dim;
  int64_t offset = 0;
  for (size_t s = 0; s < scales; s++) {
    STD_TORCH_CHECK(lengths[s] > 0 && lengths[s] < 1 << 28, "aar_native: lengths must be positive");
    STD_TORCH_CHECK(table_of[s] >= 0 && (table_of[s] + 1) * table <= rows.numel(), "aar_native: no such table");
    STD_TORCH_CHECK(!bias || (kernel_of[s] >= 0 && (kernel_of[s] + 1) * call.tables.dim <= bias->numel()),
                    "aar_native: no such phi kernel");
    call.scale[s] = {int(lengths[s]), int(offset), books > 1 ? int(s) : 0, int(table_of[s]), int(kernel_of[s])};
    offset += lengths[s];
  }
  STD_TORCH_CHECK(offset < 1 << 30, "aar_native: too many tokens");
  call.scales = int(scales);
}

void set_sequence(const Tensor& sequence, int64_t dim, int* batch, int* length) {
  STD_TORCH_CHECK(sequence.dim() == 3 && sequence.size(0) < 1 << 24 && sequence.size(1) > 0 &&
                      sequence.size(1) < 1 << 28 && sequence.size(2) == dim,
                  "aar_native: sequences must be [batch, T >= 1, latent]");
  *batch = int(sequence.size(0)), *length = int(sequence.size(1));
}

Tensor msrq_encode_cuda(Tensor x, MaybeTensor mask, Ints lengths, bool cosine, Tensor fragments, Tensor half_squares,
                        Tensor exact, Tensor bound, Tensor rows, MaybeTensor bias, int64_t taps, Ints table_of,
                        Ints kernel_of) {
  const int64_t books = exact.size(0), codes = exact.size(1), dim = x.size(2), padded = half_squares.size(1);
  cuda::Encode call = {};
  call.tables = tables_of(rows, bias, codes, dim, taps);
  set_scales(call, lengths, books, rows, bias, table_of, kernel_of);
  set_sequence(x, dim, &call.batch, &call.length);
  STD_TORCH_CHECK(padded == (codes + cuda::kTileCodes - 1) / cuda::kTileCodes * cuda::kTileCodes &&
                      half_squares.numel() == books * padded && bound.numel() == 3 * books &&
                      exact.size(2) == cuda::padded_dim(int(dim)) &&
                      fragments.numel() == books * padded * cuda::padded_dim(int(dim)),
                  "aar_native: packed codebooks of another shape");
  STD_TORCH_CHECK(!mask || mask->numel() == x.size(0) * x.size(1), "aar_native: mask of another shape");
  call.x = numbers(x);
  call.mask = mask ? on_device<uint8_t>(*mask, ScalarType::Bool) : nullptr;
  call.packed = {on_device<void>(fragments, ScalarType::BFloat16), numbers(half_squares), numbers(exact),
                 numbers(bound)};
  call.padded_codes = int(padded);
  call.cosine = cosine;
  for (int64_t n : lengths) call.tokens += int(n);
  Tensor out = make(x, {x.size(0), call.tokens}, ScalarType::Long);
  call.out = on_device<int64_t>(out, ScalarType::Long);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  cuda::EncodePlan plan = {};
  check(cuda::plan_encode(call, &plan));
  Tensor workspace = make(x, {int64_t(plan.workspace / sizeof(float))});
  call.workspace = numbers(workspace);
  check(cuda::encode(call, plan, stream_of(x)));
  return out;
}

// codes[batch, tokens of scales first..last) on top of `base`, or of zeros: writes f_hat, and where given the sum after
// each scale and those sums pooled to the next scale's length.
void msrq_decode_cuda(Tensor codes, MaybeTensor base, Ints lengths, int64_t books, int64_t size, Tensor rows,
                      MaybeTensor bias, int64_t taps, Ints table_of, Ints kernel_of, int64_t first, int64_t last,
                      Tensor f_hat, MaybeTensor scales, MaybeTensor next) {
  cuda::Decode call = {};
  call.tables = tables_of(rows, bias, size, f_hat.size(2), taps);
  set_scales(call, lengths, books, rows, bias, table_of, kernel_of);
  set_sequence(f_hat, call.tables.dim, &call.batch, &call.length);
  STD_TORCH_CHECK(first >= 0 && first <= last && last <= call.scales, "aar_native: no such scales");
  for (int64_t s = first; s < last; s++) {
    call.tokens += int(lengths[s]);
    if (s + 1 < call.scales) call.next_rows += int(lengths[s + 1]);
  }
  STD_TORCH_CHECK(codes.numel() == int64_t(call.batch) * call.tokens && (!base || base->numel() == f_hat.numel()) &&
                      (!scales || scales->numel() == (last - first) * f_hat.numel()) &&
                      (!next || next->numel() == int64_t(call.batch) * call.next_rows * call.tables.dim),
                  "aar_native: codes or outputs of another shape");
  call.codes = on_device<int64_t>(codes, ScalarType::Long);
  call.base = numbers(base), call.f_hat = numbers(f_hat);
  call.scales_out = numbers(scales), call.next_out = numbers(next);
  call.first = int(first), call.last = int(last);
  const torch::stable::accelerator::DeviceGuard guard(f_hat.get_device_index());
  check(cuda::decode(call, stream_of(f_hat)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aar_native, m) {
  m.def(
      "msrq_encode_cuda(Tensor x, Tensor? mask, int[] lengths, bool cosine, Tensor fragments, Tensor half_squares, "
      "Tensor exact, Tensor bound, Tensor rows, Tensor? bias, int taps, int[] table_of, int[] kernel_of) -> Tensor");
  m.def(
      "msrq_decode_cuda(Tensor codes, Tensor? base, int[] lengths, int books, int size, Tensor rows, Tensor? bias, int "
      "taps, int[] table_of, int[] kernel_of, int first, int last, Tensor(a!) f_hat, Tensor(b!)? scales, Tensor(c!)? "
      "next) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(aar_native, CUDA, m) {
  m.impl("msrq_encode_cuda", TORCH_BOX(&msrq_encode_cuda));
  m.impl("msrq_decode_cuda", TORCH_BOX(&msrq_decode_cuda));
}
