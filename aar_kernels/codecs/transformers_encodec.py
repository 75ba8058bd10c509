"""`transformers`: EnCodec and X-Codec (plain residual quantization), and EnCodec's convolutional stacks."""

from __future__ import annotations

from torch import Tensor

from .plain import PlainResidual
from .stacks import TransformersStack


class EncodecQuantizer(PlainResidual):
    """``encode(embeddings[B, D, T], bandwidth) -> [n, B, T]``, ``decode(codes[n, B, T]) -> [B, D, T]``."""

    def _sources(self) -> list[Tensor]:
        return [layer.codebook.embed for layer in self.layers]

    def encode(self, embeddings, bandwidth=None):
        count = min(self.get_num_quantizers_for_bandwidth(bandwidth), self.num_quantizers)
        codes = self._encode(embeddings, count)
        return super().encode(embeddings, bandwidth) if codes is None else codes.transpose(0, 1).contiguous()

    def decode(self, codes):
        out = self._decode(codes.transpose(0, 1)) if codes.dim() == 3 and len(codes) <= self.num_quantizers else None
        return super().decode(codes) if out is None else out


class XcodecQuantizer(EncodecQuantizer):
    def _sources(self) -> list[Tensor]:
        return [layer.codebook.embed for layer in self.quantizers]


ADAPTERS = {
    "transformers.models.encodec.modeling_encodec.EncodecEncoder": TransformersStack,
    "transformers.models.encodec.modeling_encodec.EncodecDecoder": TransformersStack,
    "transformers.models.encodec.modeling_encodec.EncodecResidualVectorQuantizer": EncodecQuantizer,
    "transformers.models.xcodec.modeling_xcodec.XcodecResidualVectorQuantization": XcodecQuantizer,
}
