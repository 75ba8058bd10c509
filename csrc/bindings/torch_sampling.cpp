// Sampling on LibTorch's stable ABI.
#include "aar/sampling.h"

#include "torch.h"

namespace {

Tensor sampling_sample(Tensor logits, MaybeTensor uncond, Tensor seeds, int64_t position, double conditional,
                       double unconditional, double scale, int64_t top_k, double top_p) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.size(2) > 0 && (!uncond || uncond->numel() == logits.numel()) &&
                      seeds.numel() == logits.size(0),
                  "aar_native: logits must be [B, n, V >= 1], uncond as they, seeds [B]");
  const int64_t batch = logits.size(0), tokens = logits.size(1);
  Tensor codes = make(logits, {batch, tokens}, ScalarType::Long);
  const aar::Sampling settings{float(conditional), float(unconditional), float(scale), top_k, top_p, position};
  const bool sound = aar::sampling_kernels().sample(settings, floats(logits), floats(uncond), longs(seeds), batch,
                                                    tokens, logits.size(2), longs(codes), pool());
  STD_TORCH_CHECK(sound, "logits must be neither NaN nor +inf, with guidance too, and each token needs one that is "
                         "finite");
  return codes;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aar_native, m) {
  m.def(
      "sampling_sample(Tensor logits, Tensor? uncond, Tensor seeds, int position, float conditional, float "
      "unconditional, float scale, int top_k, float top_p) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(aar_native, CPU, m) { m.impl("sampling_sample", TORCH_BOX(&sampling_sample)); }
