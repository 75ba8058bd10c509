// Blocks of a transformer on LibTorch's stable ABI.
#include "aar/transformer.h"

#include "torch_layers.h"

namespace {

using Tensors = std::vector<Tensor>;

// Per block: four weights (qkv, proj, fc1, fc2), as many scales where they are int8, and biases; one log scale per head
// or none at all; keys and values. modulations: [batch, 6 channels] per block, gate, gate, scale, scale, shift, shift,
// and [batch, 2 channels] at the end.
Tensor transformer_step(Tensor x, Tensors weights, Tensors scales, Tensors biases, Tensors head_log_scales,
                        Tensors modulations, Tensors caches, int64_t start, int64_t heads, double softmax_scale,
                        double eps) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) > 0 && heads > 0 && x.size(2) > 0 && x.size(2) % heads == 0 && start >= 0,
                  "aar_native: x must be [batch, tokens, heads * dim]");
  const int64_t channels = x.size(2), dim = channels / heads;
  const size_t depth = biases.size() / 4;
  STD_TORCH_CHECK(biases.size() == 4 * depth && weights.size() == 4 * depth && modulations.size() == depth + 1 &&
                      (scales.empty() || scales.size() == 4 * depth) && caches.size() == 2 * depth &&
                      (head_log_scales.empty() || head_log_scales.size() == depth),
                  "aar_native: lists of blocks of other lengths");
  const aar::ModulationShape rows{x.size(0), x.size(1), channels};
  const auto part = [&](const Tensor& all, int64_t i, int64_t parts) {
    STD_TORCH_CHECK(all.is_cpu() && all.scalar_type() == ScalarType::Float && all.dim() == 2 &&
                        all.size(0) == rows.batch && all.size(1) == parts * channels && all.stride(1) == 1,
                    "aar_native: modulations must be fp32 [batch, 6 or 2 times the channels]");
    return aar::Rows{static_cast<float*>(all.data_ptr()) + i * channels, aar::Element::float32, all.stride(0)};
  };
  std::vector<aar::TransformerBlock> blocks;
  for (size_t b = 0; b < depth; b++) {
    const auto layer = [&](int64_t i, int64_t N, int64_t K) {
      const size_t at = 4 * b + i;
      const MaybeTensor scale = scales.empty() ? MaybeTensor{} : MaybeTensor{scales[at]};
      return aar::TransformerLayer{weight_of(weights[at], scale, biases[at], N, K), floats(biases[at])};
    };
    const auto modulation = [&](int64_t i) { return part(modulations[b], i, 6); };
    const float* log_scale = head_log_scales.empty() ? nullptr : floats(head_log_scales[b]);
    STD_TORCH_CHECK(!log_scale || head_log_scales[b].numel() == heads, "aar_native: one scale per head");
    const aar::AttentionShape attention{aar::Element::float32, x.size(0), x.size(1), heads, dim, 0, log_scale};
    const auto cache = [&](int64_t i) {
      return heads_of(caches[2 * b + i], ScalarType::Float, attention, start + x.size(1));
    };
    const int64_t hidden = biases[4 * b + 2].numel();
    blocks.push_back({layer(0, 3 * channels, channels), layer(1, channels, channels), layer(2, hidden, channels),
                      layer(3, channels, hidden), log_scale, modulation(0), modulation(1), modulation(2), modulation(3),
                      modulation(4), modulation(5), cache(0), cache(1)});
  }
  Tensor out = make(x, {x.size(0), x.size(1), channels});
  if (x.numel() > 0)
    aar::transformer_step({x.size(0), x.size(1), heads, dim, start, float(softmax_scale), float(eps)}, blocks,
                          part(modulations[depth], 0, 2), part(modulations[depth], 1, 2), floats(x), floats(out), pool());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aar_native, m) {
  m.def(
      "transformer_step(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] biases, Tensor[] head_log_scales, "
      "Tensor[] modulations, Tensor(a!)[] caches, int start, int heads, float softmax_scale, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(aar_native, CPU, m) { m.impl("transformer_step", TORCH_BOX(&transformer_step)); }
