"""`transformers`: Mimi. Its split quantizer holds two of these lists, each between 1x1 convolutions of its own."""

from __future__ import annotations

from .plain import AveragedResidual
from .stacks import Stack, TransformersStack


class MimiQuantizer(AveragedResidual):
    """``encode(embeddings[B, C, T], num_quantizers) -> [n, B, T]``, ``decode(codes[B, n, T]) -> [B, C, T]``."""

    def _averages(self):
        books = [layer.codebook for layer in self.layers]
        return [book.embed_sum for book in books], [book.cluster_usage for book in books], books[0].epsilon

    def encode(self, embeddings, num_quantizers=None):
        count = self.num_quantizers if num_quantizers is None else min(num_quantizers, self.num_quantizers)
        codes = self._encode(embeddings if self.input_proj is None else self.input_proj(embeddings), count)
        return super().encode(embeddings, num_quantizers) if codes is None else codes.transpose(0, 1).contiguous()

    def decode(self, codes):
        out = self._decode(codes) if codes.dim() == 3 and codes.shape[1] <= self.num_quantizers else None
        if out is None:
            return super().decode(codes)
        return out if self.output_proj is None else self.output_proj(out)


class MimiEncoder(Stack):
    """``MimiEncoder``; with a cache for streaming, the original."""

    def forward(self, hidden_states, padding_cache=None):
        out = self._run(hidden_states) if padding_cache is None else None
        return super().forward(hidden_states, padding_cache) if out is None else out


ADAPTERS = {
    "transformers.models.mimi.modeling_mimi.MimiEncoder": MimiEncoder,
    "transformers.models.mimi.modeling_mimi.MimiDecoder": TransformersStack,
    "transformers.models.mimi.modeling_mimi.MimiResidualVectorQuantizer": MimiQuantizer,
}
