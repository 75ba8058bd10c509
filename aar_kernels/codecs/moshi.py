"""`moshi`, the original package of Mimi. Its split quantizer holds two of these lists."""

from __future__ import annotations

from torch import Tensor

from .encodec import CoreQuantizer
from .plain import AveragedResidual
from .stacks import OriginalDecoder, OriginalEncoder


class MoshiQuantizer(AveragedResidual, CoreQuantizer):
    """``encode`` and ``decode``; ``forward`` is the original's."""

    def _averages(self):
        books = [layer._codebook for layer in self.layers]
        return [book.embedding_sum for book in books], [book.cluster_usage for book in books], books[0].epsilon

    def decode(self, codes):
        out = self._decode_levels(codes)
        return super().decode(codes) if out is None else out


class WholeSignals:
    """The original runs where it streams, and where it refuses a signal that is no multiple of its hop."""

    def _run(self, x: Tensor) -> Tensor | None:
        whole = self.hop_length if isinstance(self, OriginalEncoder) else 1
        streams = any(getattr(module, "is_streaming", False) for module in self.modules())
        return None if streams or x.dim() != 3 or x.shape[2] % whole else super()._run(x)


class MoshiEncoder(WholeSignals, OriginalEncoder):
    """``SEANetEncoder``."""


class MoshiDecoder(WholeSignals, OriginalDecoder):
    """``SEANetDecoder``."""


ADAPTERS = {
    "moshi.modules.seanet.SEANetEncoder": MoshiEncoder,
    "moshi.modules.seanet.SEANetDecoder": MoshiDecoder,
    "moshi.quantization.core_vq.ResidualVectorQuantization": MoshiQuantizer,
}
