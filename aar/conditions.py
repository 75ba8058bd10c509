"""What an AAR is conditioned on: CLAP's embedding of sound and text (arXiv 2211.06687), through `transformers`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import soxr
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import AarError

__all__ = ["CLAP_MODEL", "Clap", "ConditionError"]

CLAP_MODEL = "laion/clap-htsat-unfused"


class ConditionError(AarError):
    """A condition cannot be made: no `transformers`, no CLAP weights, or not what the model was trained with."""


class Clap:
    """CLAP's encoders of sound and of text into the same unit vectors, ``dim`` wide (512).

    Args:
        model, feature_extractor, tokenizer: a `transformers.ClapModel` and what prepares its inputs; see
            `from_pretrained`.
    """

    def __init__(self, model, feature_extractor, tokenizer):
        self.model, self.feature_extractor, self.tokenizer = model.eval(), feature_extractor, tokenizer

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike = CLAP_MODEL) -> Clap:
        """Loads a directory of `save_pretrained`, or a name on the Hugging Face hub (downloaded once).

        Raises:
            ConditionError: `transformers` is not installed, or there is no such model.
        """
        try:
            from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel
        except ImportError as error:
            raise ConditionError(f"CLAP needs the extra `clap` (pip install 'aar-kernels[clap]'): {error}") from None
        try:
            parts = [part.from_pretrained(name) for part in (ClapModel, ClapFeatureExtractor, AutoTokenizer)]
        except (OSError, ValueError) as error:
            raise ConditionError(f"{name}: no CLAP model: {str(error).splitlines()[0]}") from None
        return cls(*parts)

    @property
    def dim(self) -> int:
        return self.model.config.projection_dim

    @torch.no_grad()
    def embed_audio(self, wavs: Sequence[Tensor], sample_rate: int) -> Tensor:
        """``[len(wavs), dim]`` of waves ``[N]``, of which CLAP hears the first ten seconds."""
        extractor = self.feature_extractor
        # Longer clips would be cropped at random, and a condition should not vary.
        waves = [
            soxr.resample(wav.float().cpu().numpy(), sample_rate, extractor.sampling_rate)[: extractor.nb_max_samples]
            for wav in wavs
        ]
        inputs = extractor(waves, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        return self._unit(self.model.get_audio_features(**inputs.to(self.model.device)))

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """``[len(texts), dim]``."""
        inputs = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        return self._unit(self.model.get_text_features(**inputs.to(self.model.device)))

    @staticmethod
    def _unit(features) -> Tensor:
        """transformers 5 wraps the embedding in an output object, earlier ones return it."""
        return F.normalize(features if isinstance(features, Tensor) else features.pooler_output, dim=-1)
