// Adaptive layer normalisation on LibTorch's stable ABI.
#include "torch_layers.h"

namespace {

aar::ModulationShape shape_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) > 0, "aar_native: x must be [batch, tokens, channels >= 1]");
  return {x.size(0), x.size(1), x.size(2)};
}

// The new residual (without elements where there is no y), its modulation, statistics [batch, tokens, 2].
std::tuple<Tensor, Tensor, Tensor> modulation_forward(Tensor x, MaybeTensor y, MaybeTensor gate, Tensor scale,
                                                      Tensor shift, double eps, ScalarType dtype) {
  const aar::ModulationShape shape = shape_of(x);
  const Ints sizes{shape.batch, shape.tokens, shape.channels};
  STD_TORCH_CHECK(y.has_value() == gate.has_value(), "aar_native: y and its gate come together");
  Tensor x_new = make(x, y ? sizes : Ints{0}, x.scalar_type()), modulated = make(x, sizes, dtype);
  Tensor statistics = make(x, {shape.batch, shape.tokens, 2});
  if (x.numel() > 0)
    aar::modulation_kernels().forward(
        shape,
        {rows_of(shape, x), rows_of(shape, y), rows_of(shape, gate), rows_of(shape, scale), rows_of(shape, shift),
         float(eps), y ? rows_of(shape, x_new) : aar::Rows{}, rows_of(shape, modulated), floats(statistics)},
        pool());
  return {x_new, modulated, statistics};
}

// Gradients of x, of y (without elements where there is none), and [2 or 3, batch, channels]: of scale, shift, gate.
std::tuple<Tensor, Tensor, Tensor> modulation_backward(MaybeTensor grad_x_new, Tensor grad_modulated, Tensor x,
                                                       MaybeTensor y, MaybeTensor gate, Tensor scale,
                                                       Tensor statistics) {
  const aar::ModulationShape shape = shape_of(x);
  const Ints sizes{shape.batch, shape.tokens, shape.channels};
  STD_TORCH_CHECK(y.has_value() == gate.has_value(), "aar_native: y and its gate come together");
  STD_TORCH_CHECK(statistics.numel() == 2 * shape.batch * shape.tokens, "aar_native: statistics of another shape");
  Tensor grad_x = make(x, sizes, x.scalar_type());
  Tensor grad_y = make(x, y ? sizes : Ints{0}, y ? y->scalar_type() : x.scalar_type());
  Tensor sums = make(x, {y ? 3 : 2, shape.batch, shape.channels});
  if (x.numel() > 0)
    aar::modulation_kernels().backward(
        shape,
        {rows_of(shape, grad_x_new), rows_of(shape, grad_modulated), rows_of(shape, x), rows_of(shape, y),
         rows_of(shape, gate), rows_of(shape, scale), floats(statistics), rows_of(shape, grad_x),
         y ? rows_of(shape, grad_y) : aar::Rows{}, floats(sums)},
        pool());
  else
    torch::stable::zero_(sums);
  return {grad_x, grad_y, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aar_native, m) {
  m.def(
      "modulation_forward(Tensor x, Tensor? y, Tensor? gate, Tensor scale, Tensor shift, float eps, ScalarType dtype) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "modulation_backward(Tensor? grad_x_new, Tensor grad_modulated, Tensor x, Tensor? y, Tensor? gate, Tensor scale, "
      "Tensor statistics) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(aar_native, CPU, m) {
  m.impl("modulation_forward", TORCH_BOX(&modulation_forward));
  m.impl("modulation_backward", TORCH_BOX(&modulation_backward));
}
