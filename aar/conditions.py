"""What an AAR is conditioned on: CLAP's embedding of sound and text (arXiv 2211.06687), through `transformers`, or
plain statistics of the sound, which need no download."""

from __future__ import annotations

import os
from collections.abc import Sequence

import soxr
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .audio.mel import LogMelSpectrogram
from .errors import AarError

__all__ = ["CLAP_MODEL", "AcousticEmbedding", "Clap", "ConditionError"]

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


class AcousticEmbedding(nn.Module):
    """How a sound is coloured and how it moves: ``dim`` = 192 numbers, fixed by formula, nothing learned.

    Of the log10 mel power in each of 64 bands (window 1024, hop 256, floor 1e-5): its mean over time, its standard
    deviation, and the mean of its |change| from frame to frame, in this order of blocks, each shifted and scaled by a
    constant to about zero mean and unit variance over music, speech and effects.

    It does not tell a sound from itself reversed, shifted in time, or with other phases, as far as frames do not; it
    does tell loudness. It knows no words and no meaning: sounds of one colour and pace are alike to it.
    """

    dim = 192

    # Mean and standard deviation of each statistic over one-second crops of the embedded clips.
    _NORMAL = ((-2.5, 1.6), (0.95, 0.57), (0.22, 0.13))

    def __init__(self, sample_rate: int = 24_000):
        super().__init__()
        self.sample_rate = sample_rate
        self.spectrogram = LogMelSpectrogram(1024, 256, self.dim // 3, sample_rate)

    @torch.no_grad()
    def forward(self, wave: Tensor) -> Tensor:
        """Waves ``[..., N]`` at `sample_rate` -> ``[..., dim]``; zeros follow a wave shorter than one window."""
        wave = F.pad(wave, (0, max(self.spectrogram.n_fft - wave.shape[-1], 0)))
        mel = self.spectrogram(wave)
        statistics = mel.mean(-1), mel.std(-1, correction=0), mel.diff(dim=-1).abs().mean(-1)
        return torch.cat([(s - mean) / std for s, (mean, std) in zip(statistics, self._NORMAL, strict=True)], dim=-1)

    def embed_audio(self, wavs: Sequence[Tensor], sample_rate: int) -> Tensor:
        """``[len(wavs), dim]`` of waves ``[N]`` at any rate, on the device of the module."""
        if sample_rate != self.sample_rate:
            arrays = (wav.float().cpu().numpy() for wav in wavs)
            wavs = [torch.from_numpy(soxr.resample(array, sample_rate, self.sample_rate)) for array in arrays]
        return torch.stack([self(wav.to(self.spectrogram.window.device)) for wav in wavs])
