#include "aar/transformer.h"

#include <algorithm>
#include <memory>
#include <utility>

namespace aar {

namespace {

struct Scratch {
  explicit Scratch(int64_t numbers) : data(new float[numbers]) {}
  operator float*() const { return data.get(); }
  std::unique_ptr<float[]> data;
};

}  // namespace

void transformer_step(const TransformerShape& shape, const std::vector<TransformerBlock>& blocks, const Rows& scale,
                      const Rows& shift, const float* x, float* out, const ThreadPool& pool) {
  const int64_t rows = shape.batch * shape.tokens, channels = shape.heads * shape.dim;
  int64_t hidden = 0;
  for (const TransformerBlock& block : blocks) hidden = std::max(hidden, block.fc1.weight.N);
  const Scratch qkv(rows * 3 * channels), inner(rows * hidden), branch(rows * channels), statistics(rows * 2);
  const Scratch streams[] = {Scratch(rows * channels), Scratch(rows * channels)};
  const ModulationShape modulated{shape.batch, shape.tokens, channels};
  const auto per_token = [&](const float* data) {
    return Rows{const_cast<float*>(data), Element::float32, channels};
  };
  const auto of_projection = [&](int64_t i) {
    const int64_t token = 3 * channels;
    return Heads{qkv + i * channels, shape.tokens * token, token, shape.dim};
  };
  const auto linear = [&](const TransformerLayer& layer, const float* in, bool gelu, float* to) {
    linear_kernels().forward(layer.weight, in, rows, layer.bias, gelu, to, pool);
  };
  // out = the modulation of the residual stream, to which `gate * branch` is added first, where there is a gate.
  const float* stream = x;
  float *next = streams[0], *other = streams[1];
  const auto modulate = [&](const Rows& gate, const Rows& by, const Rows& plus) {
    const bool adds = gate.data != nullptr;
    modulation_kernels().forward(modulated,
                                 {per_token(stream), adds ? per_token(branch) : Rows{}, gate, by, plus, shape.eps,
                                  adds ? per_token(next) : Rows{}, per_token(out), statistics},
                                 pool);
    if (adds) {
      stream = next;
      std::swap(next, other);
    }
  };

  modulate({}, blocks.empty() ? scale : blocks[0].scale1, blocks.empty() ? shift : blocks[0].shift1);
  for (size_t i = 0; i < blocks.size(); i++) {
    const TransformerBlock& block = blocks[i];
    const bool last = i + 1 == blocks.size();
    linear(block.qkv, out, false, qkv);
    const AttentionShape attention{Element::float32, shape.batch, shape.tokens, shape.heads,
                                   shape.dim,        shape.softmax_scale, block.head_log_scale};
    attention_kernels().step(attention, shape.start, of_projection(0), of_projection(1), of_projection(2),
                             block.cache_k, block.cache_v,
                             {out, shape.tokens * channels, channels, shape.dim}, pool);
    linear(block.proj, out, false, branch);
    modulate(block.gate1, block.scale2, block.shift2);
    linear(block.fc1, out, true, inner);
    linear(block.fc2, inner, false, branch);
    modulate(block.gate2, last ? scale : blocks[i + 1].scale1, last ? shift : blocks[i + 1].shift1);
  }
}

}  // namespace aar
