// How bindings unwrap what several operators take: packed weights, heads of attention, rows of modulation.
#pragma once
#include "aar/attention.h"
#include "aar/linear.h"
#include "aar/modulation.h"
#include "torch.h"

namespace {

inline aar::Storage storage_of(const Tensor& data) {
  switch (data.scalar_type()) {
    case ScalarType::Float: return aar::Storage::fp32;
    case ScalarType::BFloat16: return aar::Storage::bf16;
    case ScalarType::Char: return aar::Storage::int8;
    default: STD_TORCH_CHECK(false, "aar_native: a packed weight holds fp32, bf16 or int8");
  }
}

// data[panels][K][16] of a weight [N][K], scale[N] where int8, and the bias[N] that goes with it.
inline aar::LinearWeight weight_of(const Tensor& packed, const MaybeTensor& scale, const MaybeTensor& bias, int64_t N,
                                   int64_t K) {
  STD_TORCH_CHECK(packed.dim() == 3 && packed.size(1) == K && packed.size(2) == aar::kPanel && N > 0 &&
                      packed.size(0) == (N + aar::kPanel - 1) / aar::kPanel,
                  "aar_native: x[M, K] and a weight packed for the CPU do not fit");
  STD_TORCH_CHECK((!scale || scale->numel() == N) && (!bias || bias->numel() == N),
                  "aar_native: scale or bias of another shape");
  const aar::Storage storage = storage_of(packed);
  STD_TORCH_CHECK(scale.has_value() == (storage == aar::Storage::int8), "aar_native: int8 alone has a scale");
  return {storage, data<void>(packed, packed.scalar_type()), floats(scale), N, K};
}

// [batch, tokens or more, heads, dim] with channels side by side.
inline aar::Heads heads_of(const Tensor& tensor, ScalarType dtype, const aar::AttentionShape& shape, int64_t tokens) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 4 && tensor.scalar_type() == dtype &&
                      tensor.size(0) == shape.batch && tensor.size(1) >= tokens && tensor.size(2) == shape.heads &&
                      tensor.size(3) == shape.dim,
                  "aar_native: tensors of one attention must agree in dtype and shape");
  STD_TORCH_CHECK(tensor.stride(3) == 1 || tensor.size(3) == 1 || tensor.numel() == 0,
                  "aar_native: channels must be contiguous");
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// What an item has one row of: [batch][channels] with any stride between rows; or one row per token, contiguous.
inline aar::Rows rows_of(const aar::ModulationShape& shape, const Tensor& tensor) {
  const bool per_token = tensor.dim() == 3;
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.size(0) == shape.batch && tensor.size(-1) == shape.channels &&
                      (per_token ? tensor.is_contiguous() && tensor.size(1) == shape.tokens
                                 : tensor.dim() == 2 && (tensor.stride(1) == 1 || shape.channels == 1)),
                  "aar_native: modulation takes contiguous [batch, tokens, channels] and rows of [batch, channels]");
  aar::Rows rows{tensor.data_ptr(), aar::Element::float32, per_token ? shape.channels : tensor.stride(0)};
  switch (tensor.scalar_type()) {
    case ScalarType::Float: break;
    case ScalarType::BFloat16: rows.element = aar::Element::bfloat16; break;
    case ScalarType::Half: rows.element = aar::Element::float16; break;
    default: STD_TORCH_CHECK(false, "aar_native: modulation takes fp32, bf16 and fp16");
  }
  return rows;
}
inline aar::Rows rows_of(const aar::ModulationShape& shape, const MaybeTensor& tensor) {
  return tensor ? rows_of(shape, *tensor) : aar::Rows{};
}

}  // namespace
