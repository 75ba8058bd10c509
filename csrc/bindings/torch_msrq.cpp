// Multi-scale residual quantization on LibTorch's stable ABI.
#include "aar/msrq.h"

#include "torch.h"

namespace {

aar::Shape shape_of(const Tensor& codebooks, const Ints& lengths, bool cosine) {
  aar::Shape shape{int64_t(lengths.size()), codebooks.size(0), codebooks.size(1), codebooks.size(2), lengths.data(),
                   cosine};
  STD_TORCH_CHECK(shape.books == 1 || shape.books >= shape.scales, "aar_native: one codebook per scale, or one");
  for (int64_t n : lengths) STD_TORCH_CHECK(n > 0, "aar_native: lengths must be positive");
  return shape;
}

// `widths` is empty for sequences.
aar::Shape shape_of(const Tensor& codebooks, const Ints& lengths, const Ints& widths, bool cosine, int64_t length,
                    int64_t taps) {
  aar::Shape shape = shape_of(codebooks, lengths, cosine);
  if (widths.empty()) return shape;
  shape.widths = widths.data();
  STD_TORCH_CHECK(widths.size() == lengths.size() && length == lengths.back(), "aar_native: x must be the finest grid");
  for (size_t s = 0; s < widths.size(); s++)
    STD_TORCH_CHECK(widths[s] > 0 && lengths[s] % widths[s] == 0, "aar_native: no grid has such a width");
  int64_t side = 1;
  while (side * side < taps) side += 2;
  STD_TORCH_CHECK(side * side == taps, "aar_native: phi must be square");
  return shape;
}

aar::Packed packed_of(const aar::Shape& shape, const std::vector<Tensor>& packed) {
  const aar::PackedSizes sizes = aar::packed_sizes(shape);
  STD_TORCH_CHECK(packed.size() == 7 && packed[0].numel() == sizes.codes && packed[1].numel() == sizes.scale &&
                      packed[3].numel() == sizes.exact && packed[4].numel() == sizes.bound &&
                      packed[5].numel() == sizes.bytes && packed[6].numel() == sizes.byte_bias,
                  "aar_native: packed codebooks of another shape");
  return {data<int16_t>(packed[0], ScalarType::Short), floats(packed[1]), floats(packed[2]), floats(packed[3]),
          floats(packed[4]), packed[5].numel() > 0 ? data<uint8_t>(packed[5], ScalarType::Byte) : nullptr,
          data<int16_t>(packed[6], ScalarType::Short)};
}

// table[tables][codes][taps][dim], folded[kernels][dim][taps * dim], bias[kernels][dim].
aar::Action action_of(const aar::Shape& shape, const Tensor& codebooks, const MaybeTensor& table, const Ints& table_of,
                      const MaybeTensor& folded, const MaybeTensor& bias, const Ints& kernel_of, int64_t taps) {
  const int64_t row = shape.codes * taps * shape.dim, kernels = bias ? bias->size(0) : 0;
  for (int64_t t : table_of)
    STD_TORCH_CHECK(table && t >= 0 && (t + 1) * row <= table->numel(), "aar_native: no such table");
  for (int64_t k : kernel_of)
    STD_TORCH_CHECK(k >= 0 && k < kernels && (!folded || (k + 1) * shape.dim * taps * shape.dim <= folded->numel()),
                    "aar_native: no such phi kernel");
  STD_TORCH_CHECK((!table || int64_t(table_of.size()) == shape.scales) &&
                      (!bias || int64_t(kernel_of.size()) == shape.scales) && (table || folded || taps == 1),
                  "aar_native: phi is incomplete");
  return {taps, floats(codebooks), floats(table), table_of.data(), floats(folded), floats(bias), kernel_of.data(),
          kernels};
}

const uint8_t* mask_of(const MaybeTensor& mask) {
  return mask ? data<uint8_t>(*mask, ScalarType::Bool) : nullptr;
}

int64_t sum(const Ints& values) {
  int64_t total = 0;
  for (int64_t value : values) total += value;
  return total;
}

std::vector<Tensor> msrq_pack(Tensor codebooks, bool cosine) {
  const Ints lengths(codebooks.size(0), 1);
  const aar::Shape shape = shape_of(codebooks, lengths, cosine);
  const aar::PackedSizes sizes = aar::packed_sizes(shape);
  std::vector<Tensor> packed = {make(codebooks, {sizes.codes}, ScalarType::Short), make(codebooks, {sizes.scale}),
                                make(codebooks, {sizes.scale}), make(codebooks, {sizes.exact}),
                                make(codebooks, {sizes.bound}), make(codebooks, {sizes.bytes}, ScalarType::Byte),
                                make(codebooks, {sizes.byte_bias}, ScalarType::Short)};
  aar::msrq_kernels().pack(shape, floats(codebooks), packed_of(shape, packed), pool());
  return packed;
}

Tensor msrq_table(Tensor codebook, Tensor folded, int64_t taps) {
  const int64_t codes = codebook.size(0), dim = codebook.size(1);
  STD_TORCH_CHECK(folded.numel() == dim * taps * dim, "aar_native: folded weights of another shape");
  Tensor table = make(codebook, {codes, taps, dim});
  aar::msrq_kernels().build_table(floats(codebook), floats(folded), codes, dim, taps, floats(table), pool());
  return table;
}

Tensor msrq_encode(Tensor x, MaybeTensor mask, Tensor codebooks, Ints lengths, Ints widths, bool cosine,
                   std::vector<Tensor> packed, MaybeTensor table, Ints table_of, MaybeTensor folded, MaybeTensor bias,
                   Ints kernel_of, int64_t taps) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) > 0 && x.size(2) == codebooks.size(2) &&
                      (!mask || (mask->numel() == x.size(0) * x.size(1) && widths.empty())),
                  "aar_native: x must be [batch, T >= 1, latent]");
  const aar::Shape shape = shape_of(codebooks, lengths, widths, cosine, x.size(1), taps);
  const aar::Action action = action_of(shape, codebooks, table, table_of, folded, bias, kernel_of, taps);
  Tensor out = make(x, {x.size(0), sum(lengths)}, ScalarType::Long);
  aar::msrq_kernels().encode(shape, packed_of(shape, packed), action, floats(x), mask_of(mask), x.size(0), x.size(1),
                        longs(out), nullptr, pool());
  return out;
}

// state[batch][T][books * dim], the projected input; table[books][codes][books * dim] -> codes, what is left of the state.
std::tuple<Tensor, Tensor> msrq_encode_projected(Tensor state, Tensor codebooks, Ints lengths, bool cosine,
                                                 std::vector<Tensor> packed, Tensor table) {
  aar::Shape shape = shape_of(codebooks, lengths, cosine);
  shape.channels = shape.books * shape.dim;
  shape.repeat = true;
  STD_TORCH_CHECK(shape.books >= shape.scales, "aar_native: each level has channels of its own");
  STD_TORCH_CHECK(state.dim() == 3 && state.size(1) > 0 && state.size(2) == shape.channels &&
                      table.numel() == codebooks.size(0) * shape.codes * shape.channels,
                  "aar_native: state or table of another shape");
  for (int64_t n : lengths)
    STD_TORCH_CHECK(state.size(1) % n == 0, "aar_native: a level's length must divide that of the sequence");
  Ints table_of(shape.scales);
  for (int64_t s = 0; s < shape.scales; s++) table_of[s] = s;
  aar::Action action;
  action.codebooks = floats(codebooks);
  action.table = floats(table);
  action.table_of = table_of.data();
  Tensor out = make(state, {state.size(0), sum(lengths)}, ScalarType::Long);
  Tensor rest = make(state, {state.size(0), state.size(1), state.size(2)});
  aar::msrq_kernels().encode(shape, packed_of(shape, packed), action, floats(state), nullptr, state.size(0),
                             state.size(1), longs(out), floats(rest), pool());
  return {out, rest};
}

// codes[batch][sum of lengths] -> the rows of each frame, [batch][levels * dim][T]
Tensor msrq_gather(Tensor codes, Tensor codebooks, Ints lengths, int64_t length) {
  const aar::Shape shape = shape_of(codebooks, lengths, false);
  STD_TORCH_CHECK(shape.books >= shape.scales && codes.dim() == 2 && codes.size(1) == sum(lengths),
                  "aar_native: codes of another shape");
  for (int64_t n : lengths) STD_TORCH_CHECK(length % n == 0, "aar_native: a level's length must divide that of the sequence");
  Tensor out = make(codebooks, {codes.size(0), shape.scales * shape.dim, length});
  const bool ok = aar::msrq_kernels().gather(shape, floats(codebooks), longs(codes), codes.size(0), length, floats(out),
                                             pool());
  STD_TORCH_CHECK(ok, "codes must be in [-1, ", shape.codes, ")");
  return out;
}

// x[batch][channels][T] -> weight[outputs][channels] x + bias[outputs], [batch][outputs][T]
Tensor msrq_project(Tensor x, Tensor weight, Tensor bias) {
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2 && weight.size(1) == x.size(1) && bias.numel() == weight.size(0),
                  "aar_native: x must be [batch, channels, T] and weight [outputs, channels]");
  Tensor out = make(x, {x.size(0), weight.size(0), x.size(2)});
  aar::msrq_kernels().project(floats(x), x.size(0), x.size(1), x.size(2), floats(weight), floats(bias), weight.size(0),
                              floats(out), pool());
  return out;
}

// quantized, codes, loss sums [batch] in double, residual sum, phi's gradients (see aar::Training), statistics.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> msrq_quantize(
    Tensor x, MaybeTensor mask, Tensor codebooks, std::vector<Tensor> phi_weights, std::vector<Tensor> phi_biases,
    Ints lengths, Ints phi_index, bool cosine, MaybeTensor samples, double factor, bool want_statistics,
    bool want_phi_grad) {
  const aar::Shape shape = shape_of(codebooks, lengths, cosine);
  STD_TORCH_CHECK(shape.books == 1 || shape.books == shape.scales, "aar_native: training is of all codebooks");
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) > 0 && x.size(2) == shape.dim && (!mask || mask->numel() == x.size(0) * x.size(1)),
                  "aar_native: x must be [batch, T >= 1, latent]");
  const int64_t batch = x.size(0), tokens = sum(lengths), dim = shape.dim, kernels = int64_t(phi_weights.size());
  STD_TORCH_CHECK(phi_biases.size() == phi_weights.size() && (kernels == 0 || int64_t(phi_index.size()) == shape.scales),
                  "aar_native: phi is incomplete");
  for (int64_t k : phi_index) STD_TORCH_CHECK(k >= 0 && k < kernels, "aar_native: no such phi kernel");
  std::vector<const float*> weights, biases;
  Ints widths;
  int64_t taps = 1;
  for (int64_t k = 0; k < kernels; k++) {
    const Tensor &weight = phi_weights[k], &bias = phi_biases[k];
    STD_TORCH_CHECK(weight.dim() == 3 && weight.size(0) == dim && weight.size(1) == dim && weight.size(2) % 2 == 1 &&
                        bias.numel() == dim, "aar_native: phi of another shape");
    weights.push_back(floats(weight));
    biases.push_back(floats(bias));
    widths.push_back(weight.size(2));
    taps = std::max(taps, weight.size(2));
  }
  const aar::Phi phi{kernels, taps, weights.data(), biases.data(), widths.data(), phi_index.data()};

  Tensor quantized = make(x, {batch, x.size(1), dim}), residual_sum = make(x, {batch, x.size(1), dim});
  Tensor codes = make(x, {batch, tokens}, ScalarType::Long), loss = make(x, {batch}, ScalarType::Double);
  const int64_t learning = want_phi_grad ? kernels : 0;
  Tensor weight_grad = make_zeros(x, {learning, dim, dim, taps}), bias_grad = make_zeros(x, {learning, dim});
  const int64_t hits = shape.books * shape.codes, sums = hits * dim;
  Tensor statistics = make(x, {want_statistics ? hits + sums * (samples ? 2 : 1) : 0});
  if (batch == 0) {
    torch::stable::zero_(statistics);
    return {quantized, codes, loss, residual_sum, weight_grad, bias_grad, statistics};
  }
  STD_TORCH_CHECK(!samples || samples->numel() == hits, "aar_native: one sample per code");
  for (int64_t i = 0; samples && i < hits; i++) {
    const int64_t row = longs(*samples)[i];
    STD_TORCH_CHECK(row >= 0 && row < batch * lengths[i / shape.codes], "samples name rows outside the batch");
  }
  float* numbers = want_statistics ? floats(statistics) : nullptr;
  const aar::Training out{longs(codes), floats(quantized), data<double>(loss, ScalarType::Double), floats(residual_sum),
                          learning > 0 ? floats(weight_grad) : nullptr, learning > 0 ? floats(bias_grad) : nullptr,
                          float(factor), numbers, want_statistics ? numbers + hits : nullptr,
                          want_statistics && samples ? numbers + hits + sums : nullptr,
                          want_statistics && samples ? longs(*samples) : nullptr};
  aar::msrq_kernels().quantize(shape, floats(codebooks), phi, floats(x), mask_of(mask), batch, x.size(1), out, pool());
  return {quantized, codes, loss, residual_sum, weight_grad, bias_grad, statistics};
}

// Adds the codes of scales [first, last) to f_hat in place; fills `scales` and `next` where they have room.
void msrq_decode(Tensor codes, Tensor codebooks, Ints lengths, Ints widths, MaybeTensor table, Ints table_of,
                 MaybeTensor folded, MaybeTensor bias, Ints kernel_of, int64_t taps, int64_t first, int64_t last,
                 Tensor f_hat, MaybeTensor scales, MaybeTensor next) {
  STD_TORCH_CHECK(f_hat.dim() == 3 && f_hat.size(1) > 0, "aar_native: f_hat must be [batch, T >= 1, latent]");
  const aar::Shape shape = shape_of(codebooks, lengths, widths, false, f_hat.size(1), taps);
  const aar::Action action = action_of(shape, codebooks, table, table_of, folded, bias, kernel_of, taps);
  STD_TORCH_CHECK(first >= 0 && first <= last && last <= shape.scales, "aar_native: no such scales");
  const int64_t batch = codes.size(0), length = f_hat.size(1);
  int64_t tokens = 0, pooled = 0;
  for (int64_t s = first; s < last; s++) {
    tokens += lengths[s];
    if (s + 1 < shape.scales) pooled += lengths[s + 1];
  }
  STD_TORCH_CHECK(codes.numel() == batch * tokens && f_hat.numel() == batch * length * shape.dim &&
                      (!scales || scales->numel() == (last - first) * f_hat.numel()) &&
                      (!next || next->numel() == batch * pooled * shape.dim),
                  "aar_native: codes or outputs of another shape");
  const bool ok = aar::msrq_kernels().decode(
      shape, action, longs(codes), batch, length, first, last, floats(f_hat), scales ? floats(*scales) : nullptr,
      next ? floats(*next) : nullptr, pooled * shape.dim, pool());
  STD_TORCH_CHECK(ok, "codes must be in [-1, ", shape.codes, ")");
}

// In place on codebooks [books, codes, dim], cluster_size [books, codes] and embed_avg [books, codes, dim].
void msrq_update(Tensor codebooks, Tensor cluster_size, Tensor embed_avg, Tensor statistics, double decay,
                 double epsilon, double dead_code_threshold) {
  const Ints lengths(codebooks.size(0), 1);
  const aar::Shape shape = shape_of(codebooks, lengths, false);
  const int64_t hits = shape.books * shape.codes, sums = hits * shape.dim;
  STD_TORCH_CHECK(cluster_size.numel() == hits && embed_avg.numel() == sums &&
                      (statistics.numel() == hits + sums || statistics.numel() == hits + 2 * sums),
                  "aar_native: averages or statistics of another shape");
  const float* numbers = floats(statistics);
  aar::msrq_kernels().update(shape, {float(decay), float(epsilon), float(dead_code_threshold)}, floats(codebooks),
                        floats(cluster_size), floats(embed_avg), numbers, numbers + hits,
                        statistics.numel() > hits + sums ? numbers + hits + sums : nullptr, pool());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aar_native, m) {
  m.def("msrq_pack(Tensor codebooks, bool cosine) -> Tensor[]");
  m.def("msrq_table(Tensor codebook, Tensor folded, int taps) -> Tensor");
  m.def(
      "msrq_encode(Tensor x, Tensor? mask, Tensor codebooks, int[] lengths, int[] widths, bool cosine, Tensor[] packed, "
      "Tensor? table, int[] table_of, Tensor? folded, Tensor? bias, int[] kernel_of, int taps) -> Tensor");
  m.def(
      "msrq_encode_projected(Tensor state, Tensor codebooks, int[] lengths, bool cosine, Tensor[] packed, Tensor table) "
      "-> (Tensor, Tensor)");
  m.def("msrq_gather(Tensor codes, Tensor codebooks, int[] lengths, int length) -> Tensor");
  m.def("msrq_project(Tensor x, Tensor weight, Tensor bias) -> Tensor");
  m.def(
      "msrq_quantize(Tensor x, Tensor? mask, Tensor codebooks, Tensor[] phi_weights, Tensor[] phi_biases, int[] lengths, "
      "int[] phi_index, bool cosine, Tensor? samples, float factor, bool want_statistics, bool want_phi_grad) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "msrq_decode(Tensor codes, Tensor codebooks, int[] lengths, int[] widths, Tensor? table, int[] table_of, Tensor? "
      "folded, Tensor? bias, int[] kernel_of, int taps, int first, int last, Tensor(a!) f_hat, Tensor(b!)? scales, "
      "Tensor(c!)? next) -> ()");
  m.def(
      "msrq_update(Tensor(a!) codebooks, Tensor(b!) cluster_size, Tensor(c!) embed_avg, Tensor statistics, float decay, "
      "float epsilon, float dead_code_threshold) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(aar_native, CPU, m) {
  m.impl("msrq_pack", TORCH_BOX(&msrq_pack));
  m.impl("msrq_table", TORCH_BOX(&msrq_table));
  m.impl("msrq_encode", TORCH_BOX(&msrq_encode));
  m.impl("msrq_encode_projected", TORCH_BOX(&msrq_encode_projected));
  m.impl("msrq_gather", TORCH_BOX(&msrq_gather));
  m.impl("msrq_project", TORCH_BOX(&msrq_project));
  m.impl("msrq_quantize", TORCH_BOX(&msrq_quantize));
  m.impl("msrq_decode", TORCH_BOX(&msrq_decode));
  m.impl("msrq_update", TORCH_BOX(&msrq_update));
}
