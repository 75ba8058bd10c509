"""`transformers`: the tokenizer of Higgs Audio 2 (linear layers around a Euclidean search at each level)."""

from __future__ import annotations

from .projected import Part, Projected


class HiggsQuantizer(Projected):
    """``encode(embeddings[B, C, T], bandwidth) -> [n, B, T]``, ``decode(codes[n, B, T]) -> [B, C, T]``."""

    _metric = "euclidean"

    def _parts(self) -> list[Part]:
        return [Part(level.codebook.embed, level.project_in, level.project_out) for level in self.quantizers]

    def encode(self, embeddings, bandwidth=None):
        count = min(self.get_num_quantizers_for_bandwidth(bandwidth), self.num_quantizers)
        if (encoded := self._encode(embeddings, count, grad=False)) is None:
            return super().encode(embeddings, bandwidth)
        return encoded.codes.unflatten(1, (count, -1)).transpose(0, 1).contiguous()

    def decode(self, codes):
        known = codes.dim() == 3 and 0 not in codes.shape
        result = self._decode(codes.transpose(0, 1).flatten(1), len(codes), codes.shape[2]) if known else None
        return super().decode(codes) if result is None else result[1]


ADAPTERS = {
    "transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer."
    "HiggsAudioV2TokenizerResidualVectorQuantization": HiggsQuantizer
}
