"""`snac`: DAC's quantizer with average pooling before each level and repetition after it."""

from __future__ import annotations

import torch

from .projected import CosineSearch, Projected, decoded
from .stacks import DescriptStack


class SnacQuantizer(Projected):
    """``forward(z[B, C, T])`` -> quantized, codes ``[[B, T / stride], ...]``; and ``from_codes``."""

    def _strides(self):
        return [level.stride for level in self.quantizers]

    def forward(self, z):
        if (encoded := self._encode(z, len(self.quantizers))) is None:
            return super().forward(z)
        lengths = encoded.levels.lengths(z.shape[-1])
        return decoded(encoded, z.shape[-1]), [part.contiguous() for part in encoded.codes.split(lengths, dim=1)]

    def from_codes(self, codes):
        strides = self._strides()
        length = codes[-1].shape[-1] * strides[-1]
        fits = len(codes) == len(strides) and all(part.dim() == 2 for part in codes)
        fits = fits and all(part.shape[1] * stride == length for part, stride in zip(codes, strides, strict=True))
        result = self._decode(torch.cat(list(codes), dim=1), len(codes), length) if fits else None
        return super().from_codes(codes) if result is None else result[1]


ADAPTERS = {
    "snac.layers.Encoder": DescriptStack,
    "snac.layers.Decoder": DescriptStack,
    "snac.vq.ResidualVectorQuantize": SnacQuantizer,
}
PARTS = {"snac.vq.VectorQuantize": CosineSearch}
