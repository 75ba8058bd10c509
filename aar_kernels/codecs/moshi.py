"""`moshi`, the original package of Mimi. Its split quantizer holds two of these lists."""

from __future__ import annotations

import abc

from torch import Tensor

from .encodec import CoreQuantizer
from .plain import AveragedResidual
from .search import Search
from .stacks import Stack


class MoshiQuantizer(AveragedResidual, CoreQuantizer):
    """``encode`` and ``decode``; ``forward`` is the original's, with `MoshiCodebook` inside."""

    def _averages(self):
        books = [layer._codebook for layer in self.layers]
        return [book.embedding_sum for book in books], [book.cluster_usage for book in books], books[0].epsilon

    def forward(self, x, n_q=None):
        self._forget()
        return super().forward(x, n_q)

    def decode(self, codes):
        out = self._decode_levels(codes)
        return super().decode(codes) if out is None else out


class MoshiCodebook(Search):
    """The search alone: the original counts codes without one-hot rows itself.

    A level that waits for its k-means is nearly all zeros; which of those is nearest is rounding, so the original's.
    """

    def _quantize(self, x):
        codes = self._nearest(x.mT[None], self.embedding) if x.dim() == 2 and self.initialized else None
        return super()._quantize(x) if codes is None else codes[0]


class MoshiStack(abc.ABC, Stack):
    """The original runs where it streams.

    ABC comes first as it does in moshi's modules, for Python exchanges no classes that begin otherwise; so `forward`
    must be a subclass's own to come before the original's.
    """

    def _run(self, x: Tensor) -> Tensor | None:
        streams = any(getattr(module, "is_streaming", False) for module in self.modules())
        return None if streams else super()._run(x)


class MoshiEncoder(MoshiStack):
    """``SEANetEncoder``. The original refuses a signal that is no multiple of its hop."""

    def forward(self, x):
        out = self._run(x) if x.shape[-1] % self.hop_length == 0 else None
        return super().forward(x) if out is None else out


class MoshiDecoder(MoshiStack):
    """``SEANetDecoder``."""

    def forward(self, z):
        out = self._run(z)
        return super().forward(z) if out is None else out


ADAPTERS = {
    "moshi.modules.seanet.SEANetEncoder": MoshiEncoder,
    "moshi.modules.seanet.SEANetDecoder": MoshiDecoder,
    "moshi.quantization.core_vq.ResidualVectorQuantization": MoshiQuantizer,
}
PARTS = {"moshi.quantization.core_vq.EuclideanCodebook": MoshiCodebook}
