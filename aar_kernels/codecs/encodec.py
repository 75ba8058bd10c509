"""`encodec`, the original package of EnCodec, 24 and 48 kHz."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .adapter import Unsupported
from .plain import PlainResidual
from .search import Search, totals
from .stacks import Stack


class CoreQuantizer(PlainResidual):
    """What `encodec` and its descendant `moshi` share: ``encode(x[B, D, T], n_q) -> [n, B, T]`` and its inverse."""

    def _check(self) -> str:
        if any(not isinstance(layer.project_in, nn.Identity) for layer in self.layers):
            raise Unsupported("each level has projections of its own")
        return super()._check()

    def _decode_levels(self, codes: Tensor) -> Tensor | None:
        known = codes.dim() == 3 and len(codes) <= len(self.layers)
        return self._decode(codes.transpose(0, 1)) if known else None

    def encode(self, x, n_q=None):
        codes = self._encode(x, min(n_q or len(self.layers), len(self.layers)))
        return super().encode(x, n_q) if codes is None else codes.transpose(0, 1).contiguous()


class EncodecQuantizer(CoreQuantizer):
    """Also ``forward`` in eval mode. In training it is the original's, with `EncodecCodebook` inside."""

    def _sources(self) -> list[Tensor]:
        return [layer._codebook.embed for layer in self.layers]

    def forward(self, x, n_q=None):
        count = min(n_q or len(self.layers), len(self.layers))
        # The original fills codebooks by k-means in eval mode too, if they never were.
        ready = not self.training and all(layer._codebook.inited for layer in self.layers[:count])
        codes = self._encode(x, count) if ready else None
        out = None if codes is None else self._decode(codes)
        if out is None:
            self._forget()
            return super().forward(x, n_q)
        return out, codes.transpose(0, 1).contiguous(), torch.zeros(count, 1, device=x.device)

    def decode(self, q_indices):
        out = self._decode_levels(q_indices)
        return super().decode(q_indices) if out is None else out


class EncodecCodebook(Search):
    """``forward(x[..., D])`` in training: codes and sums of their rows, without distances and one-hot rows."""

    def forward(self, x):
        result = self._train(x) if self.training and self.inited else None
        return super().forward(x) if result is None else result

    @torch.no_grad()
    def _train(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        rows = self.preprocess(x)
        if (found := self._nearest(rows.mT[None], self.embed)) is None:
            return None
        codes, average = self.postprocess_emb(found, x.shape), self._package.ema_inplace
        quantized = self.dequantize(codes)
        self.expire_codes_(rows)
        hits, sums = totals(rows, found[0], self.codebook_size)
        average(self.cluster_size, hits, self.decay)
        average(self.embed_avg, sums, self.decay)
        smoothed = self._package.laplace_smoothing(self.cluster_size, self.codebook_size, self.epsilon)
        self.embed.data.copy_(self.embed_avg / (smoothed * self.cluster_size.sum())[:, None])
        return quantized, codes


class EncodecEncoder(Stack):
    """``SEANetEncoder``."""

    def forward(self, x):
        out = self._run(x)
        return super().forward(x) if out is None else out


class EncodecDecoder(Stack):
    """``SEANetDecoder``."""

    def forward(self, z):
        out = self._run(z)
        return super().forward(z) if out is None else out


ADAPTERS = {
    "encodec.modules.seanet.SEANetEncoder": EncodecEncoder,
    "encodec.modules.seanet.SEANetDecoder": EncodecDecoder,
    "encodec.quantization.core_vq.ResidualVectorQuantization": EncodecQuantizer,
}
PARTS = {"encodec.quantization.core_vq.EuclideanCodebook": EncodecCodebook}
