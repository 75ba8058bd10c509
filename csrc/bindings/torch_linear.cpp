// Linear layers with prepacked weights on LibTorch's stable ABI.
#include "torch_layers.h"

namespace {

// x[M][K], data[panels][K][16], scale[N] where int8, bias[N] -> [M][N]
Tensor linear_forward(Tensor x, Tensor weight, MaybeTensor scale, MaybeTensor bias, int64_t N, bool gelu) {
  STD_TORCH_CHECK(x.dim() == 2, "aar_native: x must be [M, K]");
  const aar::LinearWeight packed = weight_of(weight, scale, bias, N, x.size(1));
  Tensor out = make(x, {x.size(0), N});
  aar::linear_kernels().forward(packed, floats(x), x.size(0), floats(bias), gelu, floats(out), pool());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aar_native, m) {
  m.def("linear_forward(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, int N, bool gelu) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(aar_native, CPU, m) { m.impl("linear_forward", TORCH_BOX(&linear_forward)); }
