// Block-causal scale attention on LibTorch's stable ABI.
#include "torch_layers.h"

namespace {

aar::Element element_of(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "aar_native: expected fp32, bf16 or fp16");
  return dtype == ScalarType::Float      ? aar::Element::float32
         : dtype == ScalarType::BFloat16 ? aar::Element::bfloat16
                                         : aar::Element::float16;
}

aar::AttentionShape shape_of(const Tensor& q, const MaybeTensor& head_log_scale, double softmax_scale) {
  STD_TORCH_CHECK(q.dim() == 4 && q.size(1) > 0 && q.size(2) > 0 && q.size(3) > 0,
                  "aar_native: q must be [batch, tokens, heads, dim]");
  STD_TORCH_CHECK(!head_log_scale || head_log_scale->numel() == q.size(2), "aar_native: one scale per head");
  return {element_of(q), q.size(0), q.size(1), q.size(2), q.size(3), float(softmax_scale), floats(head_log_scale)};
}

void check_lengths(const Ints& lengths, int64_t tokens) {
  int64_t total = 0;
  for (int64_t n : lengths) {
    STD_TORCH_CHECK(n > 0, "aar_native: lengths must be positive");
    total += n;
  }
  STD_TORCH_CHECK(total == tokens, "aar_native: lengths must add up to the tokens");
}

Tensor make_like(const Tensor& q) { return make(q, {q.size(0), q.size(1), q.size(2), q.size(3)}, q.scalar_type()); }

std::tuple<Tensor, Tensor> attention_forward(Tensor q, Tensor k, Tensor v, MaybeTensor head_log_scale, Ints lengths,
                                             double softmax_scale) {
  const aar::AttentionShape shape = shape_of(q, head_log_scale, softmax_scale);
  check_lengths(lengths, shape.tokens);
  Tensor out = make_like(q), lse = make(q, {shape.batch, shape.heads, shape.tokens});
  const auto heads = [&](const Tensor& tensor) { return heads_of(tensor, q.scalar_type(), shape, shape.tokens); };
  aar::attention_kernels().forward(shape, lengths.data(), heads(q), heads(k), heads(v), heads(out), floats(lse),
                                   pool());
  return {out, lse};
}

// Gradients of q, k, v and, where it is given, head_log_scale.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v,
                                                              MaybeTensor head_log_scale, Tensor lse, Ints lengths,
                                                              double softmax_scale) {
  const aar::AttentionShape shape = shape_of(q, head_log_scale, softmax_scale);
  check_lengths(lengths, shape.tokens);
  STD_TORCH_CHECK(lse.numel() == shape.batch * shape.heads * shape.tokens, "aar_native: lse of another shape");
  Tensor grad_q = make_like(q), grad_k = make_like(q), grad_v = make_like(q);
  Tensor grad_scale = make(q, {head_log_scale ? shape.heads : 0});
  const auto heads = [&](const Tensor& tensor) { return heads_of(tensor, q.scalar_type(), shape, shape.tokens); };
  aar::attention_kernels().backward(shape, lengths.data(), heads(grad), heads(q), heads(k), heads(v), floats(lse),
                                    heads(grad_q), heads(grad_k), heads(grad_v), floats(grad_scale), pool());
  return {grad_q, grad_k, grad_v, grad_scale};
}

Tensor attention_step(Tensor q, Tensor k, Tensor v, Tensor cache_k, Tensor cache_v, MaybeTensor head_log_scale,
                      int64_t start, double softmax_scale) {
  const aar::AttentionShape shape = shape_of(q, head_log_scale, softmax_scale);
  STD_TORCH_CHECK(start >= 0, "aar_native: start must not be negative");
  Tensor out = make_like(q);
  const auto heads = [&](const Tensor& tensor) { return heads_of(tensor, q.scalar_type(), shape, shape.tokens); };
  const auto cache = [&](const Tensor& tensor) { return heads_of(tensor, q.scalar_type(), shape, start + shape.tokens); };
  aar::attention_kernels().step(shape, start, heads(q), heads(k), heads(v), cache(cache_k), cache(cache_v), heads(out),
                                pool());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aar_native, m) {
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? head_log_scale, int[] lengths, float softmax_scale) -> "
      "(Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? head_log_scale, Tensor lse, int[] "
      "lengths, float softmax_scale) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor? head_log_scale, "
      "int start, float softmax_scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(aar_native, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_step", TORCH_BOX(&attention_step));
}
