"""Log-mel spectrograms, on Slaney's mel scale.

Constants, windows and filter banks are built once, as buffers that follow the module to its device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LogMelSpectrogram", "hz_to_mel", "mel_filter_bank", "mel_to_hz"]


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

    Reflect padding by half of (window - hop) on each side centres each frame on its hop; a wave must be longer than
    that. Computed in the module's dtype, whatever the wave's and under autocast.
    """

    def __init__(self, window: int, hop: int, n_mels: int = 64, sample_rate: int = 24_000, floor: float = 1e-5):
        super().__init__()
        self.n_fft, self.hop, self.floor = window, hop, floor
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        filters = mel_filter_bank(window, n_mels, sample_rate).float()
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        pad = (self.n_fft - self.hop) // 2
        rows = wave.reshape(-1, 1, wave.shape[-1]).to(self.window.dtype)
        rows = F.pad(rows, (pad, pad), mode="reflect").squeeze(1)
        # The product with the filters would otherwise run in bfloat16, whose steps are a hundredth of a value.
        with torch.autocast(wave.device.type, enabled=False):
            spectrum = torch.stft(rows, self.n_fft, self.hop, window=self.window, center=False, return_complex=True)
            power = torch.view_as_real(spectrum).square().sum(-1)
            mel = (self.filters @ power).clamp(min=self.floor).log10()
        return mel.reshape(*wave.shape[:-1], *mel.shape[-2:])
