"""Distances of a reconstruction to its recording."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..audio.mel import LogMelSpectrogram

__all__ = ["MEL_WINDOWS", "STFT_WINDOWS", "MelDistance", "ReconstructionMetrics", "STFTDistance", "si_sdr"]

MEL_WINDOWS = tuple(2**i for i in range(5, 12))
STFT_WINDOWS = (512, 1024, 2048)


class MelDistance(nn.Module):
    """Mean |difference| of log10 mel power (64 bands), averaged over windows 32 to 2048 with hop window / 4.

    0.1 is one decibel. Waves [..., N]; the result is a scalar.
    """

    def __init__(self, sample_rate: int = 24_000, windows: Sequence[int] = MEL_WINDOWS):
        super().__init__()
        self.spectrograms = nn.ModuleList(
            LogMelSpectrogram(window, window // 4, 64, sample_rate) for window in windows
        )

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        return torch.stack([(s(estimate) - s(target)).abs().mean() for s in self.spectrograms]).mean()


class STFTDistance(nn.Module):
    """Spectral convergence plus mean |difference| of (natural) log magnitude (arXiv 1910.11480, equations 4 and 5),
    averaged over windows 512, 1024, 2048 with hop window / 4. Waves [..., N]; the result is a scalar.
    """

    def __init__(self, windows: Sequence[int] = STFT_WINDOWS):
        super().__init__()
        self.windows = tuple(windows)
        for window in self.windows:
            self.register_buffer(f"hann_{window}", torch.hann_window(window), persistent=False)

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        total = estimate.new_zeros(())
        for window in self.windows:
            ours, theirs = self._magnitude(estimate, window), self._magnitude(target, window)
            convergence = (theirs - ours).norm() / theirs.norm()
            total = total + convergence + (theirs.log() - ours.log()).abs().mean()
        return total / len(self.windows)

    def _magnitude(self, wave: Tensor, window: int) -> Tensor:
        rows = wave.reshape(-1, wave.shape[-1])
        hann = getattr(self, f"hann_{window}")
        spectrum = torch.stft(rows, window, window // 4, window=hann, return_complex=True)
        # Below this, 16-bit silence: its logarithm is not heard.
        return spectrum.abs().clamp(min=1e-3)


def si_sdr(estimate: Tensor, target: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio (arXiv 1811.02508) in dB: waves ``[..., N]`` -> ``[...]``.

    Waves count less their means. NaN where the target is silent.
    """
    estimate, target = (wave.double() - wave.double().mean(-1, keepdim=True) for wave in (estimate, target))
    energy = target.square().sum(-1, keepdim=True)
    projection = (estimate * target).sum(-1, keepdim=True) / energy * target
    noise = (estimate - projection).square().sum(-1)
    ratio = projection.square().sum(-1) / noise.clamp(min=torch.finfo(noise.dtype).tiny)
    return torch.where(energy.squeeze(-1) > 0, 10 * ratio.log10(), torch.nan)


class ReconstructionMetrics(nn.Module):
    """All of the above for one pair of waves ``[N]``: ``{"mel": ..., "stft": ..., "si_sdr": ...}``.

    Waves shorter than the longest window are filled with zeros to that.
    """

    names = ("mel", "stft", "si_sdr")

    def __init__(self, sample_rate: int = 24_000):
        super().__init__()
        self.mel, self.stft = MelDistance(sample_rate), STFTDistance()

    @torch.no_grad()
    def forward(self, estimate: Tensor, target: Tensor) -> dict[str, float]:
        missing = max(max(MEL_WINDOWS) - target.shape[-1], 0)
        pair = F.pad(estimate, (0, missing)), F.pad(target, (0, missing))
        values = self.mel(*pair), self.stft(*pair), si_sdr(estimate, target)
        return dict(zip(self.names, (value.item() for value in values), strict=True))
