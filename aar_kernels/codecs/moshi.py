"""`moshi`, the original package of Mimi. Its split quantizer holds two of these lists."""

from __future__ import annotations

from .encodec import CoreQuantizer
from .plain import AveragedResidual


class MoshiQuantizer(AveragedResidual, CoreQuantizer):
    """``encode`` and ``decode``; ``forward`` is the original's."""

    def _averages(self):
        books = [layer._codebook for layer in self.layers]
        return [book.embedding_sum for book in books], [book.cluster_usage for book in books], books[0].epsilon

    def decode(self, codes):
        out = self._decode_levels(codes)
        return super().decode(codes) if out is None else out


ADAPTERS = {"moshi.quantization.core_vq.ResidualVectorQuantization": MoshiQuantizer}
