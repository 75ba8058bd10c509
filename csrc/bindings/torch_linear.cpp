// Linear layers with prepacked weights on LibTorch's stable ABI.
#include "aar/linear.h"

#include "torch.h"

namespace {

aar::Storage storage_of(const Tensor& data) {
  switch (data.scalar_type()) {
    case ScalarType::Float: return aar::Storage::fp32;
    case ScalarType::BFloat16: return aar::Storage::bf16;
    case ScalarType::Char: return aar::Storage::int8;
    default: STD_TORCH_CHECK(false, "aar_native: a packed weight holds fp32, bf16 or int8");
  }
}

// x[M][K], data[panels][K][16], scale[N] where int8, bias[N] -> [M][N]
Tensor linear_forward(Tensor x, Tensor weight, MaybeTensor scale, MaybeTensor bias, int64_t N, bool gelu) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 3 && weight.size(1) == x.size(1) && weight.size(2) == aar::kPanel &&
                      N > 0 && weight.size(0) == (N + aar::kPanel - 1) / aar::kPanel,
                  "aar_native: x[M, K] and a weight packed for the CPU do not fit");
  STD_TORCH_CHECK((!scale || scale->numel() == N) && (!bias || bias->numel() == N),
                  "aar_native: scale or bias of another shape");
  const aar::Storage storage = storage_of(weight);
  STD_TORCH_CHECK(scale.has_value() == (storage == aar::Storage::int8), "aar_native: int8 alone has a scale");
  const aar::LinearWeight packed{storage, data<void>(weight, weight.scalar_type()), floats(scale), N, x.size(1)};
  Tensor out = make(x, {x.size(0), N});
  aar::linear_kernels().forward(packed, floats(x), x.size(0), floats(bias), gelu, floats(out), pool());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aar_native, m) {
  m.def("linear_forward(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, int N, bool gelu) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(aar_native, CPU, m) { m.impl("linear_forward", TORCH_BOX(&linear_forward)); }
