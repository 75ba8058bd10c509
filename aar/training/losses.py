"""Losses of the tokenizer (arXiv 2408.09027): reconstruction, and EnCodec's adversarial terms (arXiv 2210.13438)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..audio.mel import LogMelSpectrogram
from .discriminator import Judgement

WINDOWS = tuple(2**i for i in range(5, 12))


class MultiResolutionMelLoss(nn.Module):
    """Sum over windows of mean |d| + mean d^2, d the difference of log-mel spectrograms at hop window / 4.

    Waves [..., N]; the result is a scalar.
    """

    def __init__(self, sample_rate: int = 24_000, windows: Sequence[int] = WINDOWS, n_mels: int = 64):
        super().__init__()
        self.spectrograms = nn.ModuleList(
            LogMelSpectrogram(window, window // 4, n_mels, sample_rate) for window in windows
        )

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        total = estimate.new_zeros(())
        for spectrogram in self.spectrograms:
            difference = spectrogram(estimate) - spectrogram(target)
            total = total + difference.abs().mean() + difference.square().mean()
        return total


def discriminator_hinge_loss(real: Sequence[Judgement], fake: Sequence[Judgement]) -> Tensor:
    """Scalar: pushes logits of recordings above 1 and of reconstructions below -1; mean over resolutions."""
    terms = [
        F.relu(1 - r.logits.float()).mean() + F.relu(1 + f.logits.float()).mean()
        for r, f in zip(real, fake, strict=True)
    ]
    return torch.stack(terms).mean()


def generator_hinge_loss(fake: Sequence[Judgement]) -> Tensor:
    """Scalar: pushes logits of reconstructions above 1; mean over resolutions."""
    return torch.stack([F.relu(1 - f.logits.float()).mean() for f in fake]).mean()


def feature_matching_loss(real: Sequence[Judgement], fake: Sequence[Judgement]) -> Tensor:
    """Scalar: mean |difference| of feature maps, as a part of mean |feature of the recording|; mean over all maps.

    Features of recordings are constants here: a discriminator does not learn to make them alike.
    """
    terms = []
    for r, f in zip(real, fake, strict=True):
        for recorded, made in zip(r.features, f.features, strict=True):
            recorded = recorded.detach().float()
            scale = recorded.abs().mean().clamp(min=torch.finfo(recorded.dtype).tiny)
            terms.append(F.l1_loss(made.float(), recorded) / scale)
    return torch.stack(terms).mean()


@dataclass(frozen=True)
class LossWeights:
    """Factors of the tokenizer's losses; the defaults are the published ones.

    Raises:
        ValueError: a negative weight.
    """

    adversarial: float = 3.0
    feature_matching: float = 3.0
    wave: float = 0.1
    mel: float = 1.0
    commitment: float = 1.0

    def __post_init__(self):
        for name, weight in vars(self).items():
            if not weight >= 0:
                raise ValueError(f"weight {name} must not be negative, got {weight}")


class TokenizerTerms(NamedTuple):
    """The weighted sum, and its terms before weighting; scalars. Without a discriminator its two terms are zero."""

    total: Tensor
    mel: Tensor
    wave: Tensor
    commitment: Tensor
    adversarial: Tensor
    feature_matching: Tensor


class TokenizerLoss(nn.Module):
    """All that the tokenizer learns from, of waves [B, 1, N] and what a discriminator says of them."""

    def __init__(self, sample_rate: int = 24_000, weights: LossWeights | None = None):
        super().__init__()
        self.weights = weights or LossWeights()
        self.mel = MultiResolutionMelLoss(sample_rate)

    def forward(
        self,
        estimate: Tensor,
        target: Tensor,
        commitment: Tensor,
        real: Sequence[Judgement] = (),
        fake: Sequence[Judgement] = (),
    ) -> TokenizerTerms:
        """
        Args:
            commitment: scalar, the third that `SAT.forward` returns.
            real: the discriminator on `target`; needs no gradient. Empty before the adversarial phase.
            fake: the discriminator on `estimate`.
        """
        # Not in bfloat16, where a sum of waves' differences would lose what it adds.
        mel, wave = self.mel(estimate, target), F.l1_loss(estimate.float(), target.float())
        zero = mel.new_zeros(())
        adversarial = generator_hinge_loss(fake) if fake else zero
        matching = feature_matching_loss(real, fake) if fake else zero
        w = self.weights
        total = w.mel * mel + w.wave * wave + w.commitment * commitment
        total = total + w.adversarial * adversarial + w.feature_matching * matching
        return TokenizerTerms(total, mel, wave, commitment, adversarial, matching)
