"""DAC: `descript-audio-codec`, and the same in `transformers`."""

from __future__ import annotations

from .projected import CosineSearch, Projected, ProjectedSearch, code_rows, decoded
from .stacks import DacStack, DescriptStack


class DacQuantizer(Projected):
    """What the two packages share."""

    def _quantize(self, z, n_quantizers):
        """Quantized, codes, latents, and each level's mean squared distance ``[B, n]``; None: the original."""
        count = len(self.quantizers) if n_quantizers is None else min(n_quantizers, len(self.quantizers))
        encoded = None if self.training else self._encode(z, count)
        if encoded is None:
            return None
        codes = encoded.codes.unflatten(1, (count, z.shape[-1]))
        error = (encoded.latents - code_rows(codes, encoded.levels)).square()
        return decoded(encoded, z.shape[-1]), codes, encoded.latents, error.unflatten(1, (count, -1)).mean(dim=(2, 3))

    def _from_codes(self, codes):
        result = self._decode(codes.flatten(1), *codes.shape[1:]) if codes.dim() == 3 else None
        if result is None:
            return None
        levels, quantized = result
        return quantized, code_rows(codes, levels), codes


class DescriptQuantizer(DacQuantizer):
    """``forward(z[B, C, T], n_quantizers)`` in eval mode, and ``from_codes(codes[B, n, T])``."""

    def forward(self, z, n_quantizers=None):
        if (result := self._quantize(z, n_quantizers)) is None:
            return super().forward(z, n_quantizers)
        quantized, codes, latents, distance = result
        loss = distance.mean(dim=0).sum()
        return quantized, codes, latents, loss, loss.clone()

    def from_codes(self, codes):
        return self._from_codes(codes) or super().from_codes(codes)


class TransformersQuantizer(DacQuantizer):
    """The same; its losses have an entry, all alike, for each item."""

    def forward(self, hidden_state, n_quantizers=None):
        if (result := self._quantize(hidden_state, n_quantizers)) is None:
            return super().forward(hidden_state, n_quantizers)
        quantized, codes, latents, distance = result
        loss = distance.mean(dim=0).sum().repeat(len(codes))
        return quantized, codes, latents, loss, loss.clone()

    def from_codes(self, audio_codes):
        return self._from_codes(audio_codes) or super().from_codes(audio_codes)


class TransformersSearch(ProjectedSearch):
    """The search of one level in training."""

    def decode_latents(self, hidden_states):
        return self._search(hidden_states) or super().decode_latents(hidden_states)


ADAPTERS = {
    "dac.model.dac.Encoder": DescriptStack,
    "dac.model.dac.Decoder": DescriptStack,
    "dac.nn.quantize.ResidualVectorQuantize": DescriptQuantizer,
    "transformers.models.dac.modeling_dac.DacEncoder": DacStack,
    "transformers.models.dac.modeling_dac.DacDecoder": DacStack,
    "transformers.models.dac.modeling_dac.DacResidualVectorQuantizer": TransformersQuantizer,
}
PARTS = {
    "dac.nn.quantize.VectorQuantize": CosineSearch,
    "transformers.models.dac.modeling_dac.DacVectorQuantize": TransformersSearch,
}
