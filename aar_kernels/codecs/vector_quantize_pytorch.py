"""`vector-quantize-pytorch`: ``ResidualVQ`` with Euclidean codebooks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .adapter import Unsupported
from .plain import PlainResidual


class ResidualVQ(PlainResidual):
    """``forward(x[B, N, C])`` in eval mode without options -> quantized ``[B, N, C]``, indices ``[B, N, levels]``,
    losses (zeros); and ``get_output_from_indices``. All else, training among it, is the original's."""

    def _sources(self) -> list[Tensor]:
        layers = self.layers[:1] if self.shared_codebook else self.layers
        return [layer._codebook.embed for layer in layers]

    def _stack(self, sources: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(sources))

    @classmethod
    def check(cls, module) -> str:
        options = {
            "implicit neural codebooks": module.implicit_neural_codebook, "image maps": module.accept_image_fmap,
            "beam search": module.beam_size is not None, "DiVeQ": module.diveq,
            "cosine similarity": any(layer.use_cosine_sim for layer in module.layers),
            "affine parameters": any(layer._codebook.affine_param for layer in module.layers),
            "a bridge": any(layer._codebook.vq_bridge is not None for layer in module.layers),
        }  # fmt: skip
        if used := [name for name, value in options.items() if value]:
            raise Unsupported(f"it uses {', '.join(used)}")
        return super().check(module)

    def forward(
        self, x, mask=None, indices=None, return_all_codes=False, sample_codebook_temp=None, freeze_codebook=False,
        beam_size=None, rand_quantize_dropout_fixed_seed=None,
    ):  # fmt: skip
        plain = mask is None and indices is None and beam_size is None and not return_all_codes and x.dim() == 3
        # The original fills codebooks by k-means in eval mode too, if they never were.
        if plain and not self.training and all(layer._codebook.initted for layer in self.layers):
            codes = self._encode(self.project_in(x).mT, self.num_quantizers)
            out = None if codes is None else self._decode(codes)
            if out is not None:
                losses = torch.zeros(self.num_quantizers, device=x.device)
                return self.project_out(out.mT), codes.permute(0, 2, 1).contiguous(), losses
        return super().forward(
            x, mask, indices, return_all_codes, sample_codebook_temp, freeze_codebook, beam_size,
            rand_quantize_dropout_fixed_seed,
        )  # fmt: skip

    def get_output_from_indices(self, indices):
        known = indices.dim() == 3 and indices.shape[-1] == self.num_quantizers
        out = self._decode(indices.mT, least=-1) if known else None  # -1: a level that quantize dropout left out
        return super().get_output_from_indices(indices) if out is None else self.project_out(out.mT)


ADAPTERS = {"vector_quantize_pytorch.residual_vq.ResidualVQ": ResidualVQ}
