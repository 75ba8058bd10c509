// SEANet's convolution stacks and LSTM on LibTorch's stable ABI.
#include "aar/seanet.h"

#include "torch.h"

namespace {

constexpr size_t kFields = 11;  // of a layer, as aar_kernels/seanet/layers.py lists them

// How weights are stored, and what they are to kernels.
struct Stored {
  explicit Stored(const Tensor& weights)
      : element(weights.scalar_type() == ScalarType::BFloat16 ? aar::Element::bfloat16 : aar::Element::float32),
        bytes(element == aar::Element::bfloat16 ? data<char>(weights, ScalarType::BFloat16)
                                                : data<char>(weights, ScalarType::Float)) {}
  const void* at(int64_t i) const { return bytes + i * (element == aar::Element::bfloat16 ? 2 : 4); }
  aar::Element element;
  const char* bytes;
};

std::vector<aar::SeanetLayer> layers_of(const Ints& fields, const Tensor& weights) {
  STD_TORCH_CHECK(!fields.empty() && fields.size() % kFields == 0, "aar_native: layers of another form");
  std::vector<aar::SeanetLayer> layers;
  const Stored stored(weights);
  int64_t next = 0;
  for (size_t i = 0; i < fields.size(); i += kFields) {
    const int64_t* f = &fields[i];
    aar::SeanetLayer layer{aar::SeanetKind(f[0]), f[1], f[2], f[3], f[4], f[5], f[6], aar::SeanetPadding(f[7]),
                           f[8] != 0, aar::SeanetActivation(f[9]), f[10] != 0};
    const bool residual = layer.kind == aar::SeanetKind::residual;
    const int64_t taps = (layer.kernel - 1) * layer.dilation + 1;
    STD_TORCH_CHECK(f[0] >= 0 && f[0] <= 2 && f[7] >= 0 && f[7] <= 3 && f[9] >= 0 && f[9] <= 2 && layer.in > 0 &&
                        layer.out > 0 && layer.kernel > 0 && layer.stride > 0 && layer.dilation > 0 &&
                        taps >= layer.stride &&
                        (layers.empty() || layers.back().out == layer.in),
                    "aar_native: a layer that cannot be");
    STD_TORCH_CHECK(!residual || (layer.hidden > 0 && layer.stride == 1 && (layer.shortcut || layer.in == layer.out) &&
                                  layer.padding != aar::SeanetPadding::symmetric),
                    "aar_native: a residual block that cannot be");
    layer.first = stored.at(next);
    layer.second = stored.at(next + layer.first_size());
    next += layer.first_size() + layer.second_size();
    layer.alpha = stored.at(next);
    layer.hidden_alpha = stored.at(next + layer.alpha_size());
    next += layer.alpha_size() + layer.hidden_alpha_size();
    STD_TORCH_CHECK(next <= weights.numel(), "aar_native: weights are missing");
    layers.push_back(layer);
  }
  STD_TORCH_CHECK(next == weights.numel(), "aar_native: weights are left over");
  return layers;
}

Tensor run_stack(const std::vector<aar::SeanetLayer>& layers, const Tensor& x, const Tensor& weights, int64_t block,
                 const aar::SeanetChunk& chunk) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) > 0 && x.size(2) == layers[0].in && block >= 0,
                  "aar_native: x is not [B, T, in]");
  int64_t length = x.size(1);
  for (const auto& layer : layers) {
    length = layer.length(length);
    STD_TORCH_CHECK(length > 0, "aar_native: x is shorter than what a layer reads");
  }
  Tensor out = make(x, {x.size(0), length, layers.back().out});
  aar::seanet_kernels().stack(layers.data(), int64_t(layers.size()), Stored(weights).element, floats(x), x.size(0),
                              x.size(1), block, floats(out), chunk, pool());
  return out;
}

// x[B][T][in], weights[...] -> [B][T'][out]
Tensor seanet_stack(Tensor x, Tensor weights, Ints fields, int64_t block) {
  return run_stack(layers_of(fields, weights), x, weights, block, {nullptr, 0, true});
}

// The same of steps from `position` on; state[B][...] is replaced, unless the signal ends
Tensor seanet_stack_chunk(Tensor x, Tensor weights, Ints fields, Tensor state, int64_t position, bool last,
                          int64_t block) {
  const auto layers = layers_of(fields, weights);
  STD_TORCH_CHECK(x.dim() == 3 && position >= 0, "aar_native: x is not [B, T, in], or begins before the signal");
  int64_t before = position, length = x.size(1), size = 0;
  for (const auto& layer : layers) {
    const bool transposed = layer.kind == aar::SeanetKind::transposed;
    const int64_t stride = transposed ? 1 : layer.stride, context = layer.context();
    STD_TORCH_CHECK(layer.padding == aar::SeanetPadding::causal ||
                        (context == 0 && layer.padding != aar::SeanetPadding::symmetric),
                    "aar_native: a layer sees the future");
    STD_TORCH_CHECK(before % stride == 0 && (last || length % stride == 0), "aar_native: a chunk cuts a stride");
    STD_TORCH_CHECK(last || before > 0 || !layer.reflect || length > context, "aar_native: too short to be mirrored");
    size += layer.kept() * layer.in;
    before = layer.length(before);
    length = layer.length(length);
  }
  STD_TORCH_CHECK(state.numel() == x.size(0) * size, "aar_native: a state of another size");
  return run_stack(layers, x, weights, block, {floats(state), position, last});
}

// x[B][T][in], weights[...], dy[B][T'][out] -> the size of x, or nothing, and of weights
std::tuple<Tensor, Tensor> seanet_backward(Tensor x, Tensor weights, Ints fields, Tensor dy, bool needs_x) {
  floats(weights);  // of no other dtype, unlike those of a stack
  const auto layers = layers_of(fields, weights);
  const aar::SeanetLayer& layer = layers[0];
  const bool pads = layer.padding == aar::SeanetPadding::centered || layer.padding == aar::SeanetPadding::causal;
  STD_TORCH_CHECK(layers.size() == 1 && pads && layer.activation != aar::SeanetActivation::snake &&
                      (layer.stride == 1 || layer.dilation == 1),
                  "aar_native: a layer that has no backward pass");
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) > 0 && x.size(2) == layer.in, "aar_native: x is not [B, T, in]");
  STD_TORCH_CHECK(dy.numel() == x.size(0) * layer.length(x.size(1)) * layer.out, "aar_native: dy of another size");
  Tensor dx = make(x, needs_x ? Ints{x.size(0), x.size(1), x.size(2)} : Ints{0}), gradient = make(x, {weights.numel()});
  aar::seanet_kernels().backward(layer, floats(x), floats(dy), x.size(0), x.size(1), needs_x ? floats(dx) : nullptr,
                                 floats(gradient), pool());
  return {dx, gradient};
}

// x[B][T][units], weights[...], state[layers][2][B][units] or none -> the size of x, and of state
std::tuple<Tensor, Tensor> seanet_lstm(Tensor x, Tensor weights, int64_t count, bool skip, MaybeTensor state) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) > 0 && x.size(2) > 0 && count > 0, "aar_native: x is not [B, T, units]");
  const int64_t batch = x.size(0), units = x.size(2), columns = (units + 15) / 16 * 64;
  const int64_t size = aar::SeanetLayer::size(units, columns);
  STD_TORCH_CHECK(weights.numel() == 2 * count * size, "aar_native: weights of another size");
  STD_TORCH_CHECK(!state || state->numel() == 2 * count * batch * units, "aar_native: a state of another size");
  std::vector<aar::LstmLayer> layers;
  const Stored stored(weights);
  for (int64_t i = 0; i < count; i++) layers.push_back({stored.at(2 * i * size), stored.at((2 * i + 1) * size)});
  Tensor out = make(x, {batch, x.size(1), units}), after = make(x, {count, 2, batch, units});
  if (batch > 0)
    aar::seanet_kernels().lstm(layers.data(), count, stored.element, floats(x), batch, x.size(1), units, skip,
                               floats(state), floats(out), floats(after), pool());
  return {out, after};
}

// x[B][T][C] in place, scale[C], shift[C], add of the size of x or none
void seanet_norm_(Tensor x, Tensor scale, Tensor shift, double eps, MaybeTensor add) {
  STD_TORCH_CHECK(x.dim() == 3 && scale.numel() == x.size(2) && shift.numel() == x.size(2) &&
                      (!add || add->numel() == x.numel()),
                  "aar_native: x is not [B, T, C], or what is added is of another size");
  if (x.numel() > 0)
    aar::seanet_kernels().norm(floats(x), x.size(0), x.size(1), x.size(2), floats(scale), floats(shift), float(eps),
                               floats(add), pool());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aar_native, m) {
  m.def("seanet_stack(Tensor x, Tensor weights, int[] layers, int block) -> Tensor");
  m.def(
      "seanet_stack_chunk(Tensor x, Tensor weights, int[] layers, Tensor(a!) state, int position, bool last, "
      "int block) -> Tensor");
  m.def("seanet_backward(Tensor x, Tensor weights, int[] layers, Tensor dy, bool needs_x) -> (Tensor, Tensor)");
  m.def("seanet_lstm(Tensor x, Tensor weights, int layers, bool skip, Tensor? state) -> (Tensor, Tensor)");
  m.def("seanet_norm_(Tensor(a!) x, Tensor scale, Tensor shift, float eps, Tensor? add) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(aar_native, CPU, m) {
  m.impl("seanet_stack", TORCH_BOX(&seanet_stack));
  m.impl("seanet_stack_chunk", TORCH_BOX(&seanet_stack_chunk));
  m.impl("seanet_backward", TORCH_BOX(&seanet_backward));
  m.impl("seanet_lstm", TORCH_BOX(&seanet_lstm));
  m.impl("seanet_norm_", TORCH_BOX(&seanet_norm_));
}
