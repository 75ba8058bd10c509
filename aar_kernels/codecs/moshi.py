"""`moshi`, the original package of Mimi. Its split quantizer holds two of these lists."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .adapter import Unsupported
from .plain import PlainResidual


class MoshiQuantizer(PlainResidual):
    """``encode(x[B, D, T], n_q) -> [n, B, T]``, ``decode(codes[n, B, T]) -> [B, D, T]``.

    A codebook is ``embedding_sum / clamp(cluster_usage)``. The original keeps the first one that it computes until it
    trains; this follows the weights.
    """

    def _sources(self) -> list[Tensor]:
        books = [layer._codebook for layer in self.layers]
        return [book.embedding_sum for book in books] + [book.cluster_usage for book in books]

    def _stack(self, sources: Sequence[Tensor]) -> Tensor:
        count, epsilon = len(self.layers), self.layers[0]._codebook.epsilon
        return torch.stack(list(sources[:count])) / torch.stack(list(sources[count:])).clamp(min=epsilon)[..., None]

    @classmethod
    def check(cls, module) -> str:
        if any(not isinstance(layer.project_in, nn.Identity) for layer in module.layers):
            raise Unsupported("each level has projections of its own")
        return super().check(module)

    def encode(self, x, n_q=None):
        codes = self._encode(x, min(n_q or len(self.layers), len(self.layers)))
        return super().encode(x, n_q) if codes is None else codes.transpose(0, 1).contiguous()

    def decode(self, codes):
        known = codes.dim() == 3 and len(codes) <= len(self.layers)
        out = self._decode(codes.transpose(0, 1)) if known else None
        return super().decode(codes) if out is None else out


ADAPTERS = {"moshi.quantization.core_vq.ResidualVectorQuantization": MoshiQuantizer}
