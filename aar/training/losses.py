"""Reconstruction losses of the tokenizer: multi-resolution mel distance and wave distance (arXiv 2408.09027).

Constants, windows and filter banks are built once, as buffers that follow the module to its device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WINDOWS = tuple(2**i for i in range(5, 12))


def hz_to_mel(frequency: Tensor) -> Tensor:
    """Slaney's mel scale (Auditory Toolbox, 1998): 15 mel per kHz up to 1 kHz, then 27 mel per factor 6.4."""
    linear = 0.015 * frequency
    logarithmic = 15.0 + 27.0 / math.log(6.4) * torch.log(frequency.clamp(min=1e-3) / 1000.0)
    return torch.where(frequency < 1000.0, linear, logarithmic)


def mel_to_hz(mel: Tensor) -> Tensor:
    """The inverse of `hz_to_mel`."""
    return torch.where(mel < 15.0, mel / 0.015, 1000.0 * torch.exp(math.log(6.4) / 27.0 * (mel - 15.0)))


def mel_filter_bank(n_fft: int, n_mels: int, sample_rate: int) -> Tensor:
    """Triangles of unit area, evenly spaced in mel up to half the rate: [n_mels, n_fft // 2 + 1], float64.

    A short window has fewer bins than triangles: then some rows are zero, and count as equal in every loss.
    """
    bins = torch.linspace(0.0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    top = hz_to_mel(torch.tensor(sample_rate / 2, dtype=torch.float64)).item()
    corners = mel_to_hz(torch.linspace(0.0, top, n_mels + 2, dtype=torch.float64))
    low, middle, high = (corners[i : i + n_mels, None] for i in range(3))
    triangles = torch.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clamp(min=0.0)
    return triangles * 2.0 / (high - low)


class LogMelSpectrogram(nn.Module):
    """log10 of the mel power spectrum: wave [..., N] to [..., n_mels, N // hop].

    Reflect padding by half of (window - hop) on each side centres each frame on its hop.
    """

    def __init__(
        self, window: int, hop: int, n_mels: int = 64, sample_rate: int = 24_000, floor: float = 1e-5
    ):
        super().__init__()
        self.n_fft, self.hop, self.floor = window, hop, floor
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        filters = mel_filter_bank(window, n_mels, sample_rate).float()
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        pad = (self.n_fft - self.hop) // 2
        rows = F.pad(wave.reshape(-1, 1, wave.shape[-1]), (pad, pad), mode="reflect").squeeze(1)
        spectrum = torch.stft(
            rows, self.n_fft, self.hop, window=self.window, center=False, return_complex=True
        )
        power = torch.view_as_real(spectrum).square().sum(-1)
        mel = (self.filters @ power).clamp(min=self.floor).log10()
        return mel.reshape(*wave.shape[:-1], *mel.shape[-2:])


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


class ReconstructionTerms(NamedTuple):
    """The weighted sum, and its terms before weighting; scalars."""

    total: Tensor
    mel: Tensor
    wave: Tensor


class ReconstructionLoss(nn.Module):
    """Multi-resolution mel plus 0.1 times mean |difference| of waves [..., N]: the published weights."""

    def __init__(self, sample_rate: int = 24_000, mel_weight: float = 1.0, wave_weight: float = 0.1):
        super().__init__()
        self.mel = MultiResolutionMelLoss(sample_rate)
        self.mel_weight, self.wave_weight = mel_weight, wave_weight

    def forward(self, estimate: Tensor, target: Tensor) -> ReconstructionTerms:
        mel, wave = self.mel(estimate, target), F.l1_loss(estimate, target)
        return ReconstructionTerms(self.mel_weight * mel + self.wave_weight * wave, mel, wave)
